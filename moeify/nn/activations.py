"""Activations by canonical name, as sites and experts name them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.kernels.elementwise import FUNCTIONS

Activation = Callable[[Tensor], Tensor]


# A plain dict: dynamo refuses to read a MappingProxyType after any dict of the frame has changed.
ACTIVATIONS: Final[Mapping[str, Activation]] = {
    **FUNCTIONS,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "mish": F.mish,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
}
"""Canonical name to function; parameters are torch's defaults."""


def activation(name: str) -> Activation:
    """Return the activation called `name`; raise ValueError for an unknown one.

    >>> activation("relu2")(torch.tensor([-1.0, 3.0])).tolist()
    [0.0, 9.0]
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: {name!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
