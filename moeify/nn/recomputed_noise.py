"""Random draws that activation checkpointing repeats when it recomputes a forward.

torch repeats them by restoring the state of the random number generators, unless the user turned
that off (`preserve_rng_state=False`), and a router that draws anew routes other tokens. So the
state at each draw is kept in the checkpointed region, for its recomputations.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moeify.compat import checkpoint_regions


@contextmanager
def repeated_draws(who: Hashable, device: torch.device) -> Iterator[None]:
    """Draw in a recomputation what was drawn in its forward; nothing changes elsewhere.

    Args:
        who: Whose draws they are; their order is that of its calls.
        device: Where they are drawn.
    """
    regions = [] if device.type == "meta" else checkpoint_regions()
    if not regions:
        yield
        return
    before = _state(device)
    inside = next((i for i, r in enumerate(regions) if r.recomputation is not None), None)
    state = before
    if inside is not None:
        kept = regions[inside].take(who)
        state = before if kept is None else kept
    for region in regions[:inside]:
        region.keep(who, state)
    # As lists: selective checkpointing would see an operation that the forward did not have.
    if state is before or state.tolist() == before.tolist():
        yield  # what follows draws as in the forward, too
        return
    _set_state(device, state)
    try:
        yield
    finally:
        _set_state(device, before)


def _state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def _set_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
