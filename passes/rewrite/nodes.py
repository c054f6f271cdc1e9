"""Adding nodes to a block's graph, and the ops that they call."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import fx

# These register the ops.
from moeify.kernels import all_to_all_layout as _layouts  # noqa: F401
from moeify.kernels import combine as _combine  # noqa: F401
from moeify.kernels import dispatch as _dispatch  # noqa: F401

ops = torch.ops.moeify


def add_node(
    graph: fx.Graph, target: Callable[..., Any] | str, args: tuple[Any, ...], name: str
) -> fx.Node:
    """Add a call of a function, or of the module at a path, named `name` or `name_1`, ..."""
    if isinstance(target, str):
        made = graph.call_module(target, args)
    else:
        made = graph.call_function(target, args)
    made._rename(name)
    if isinstance(target, FunctionType):
        made.meta["is_wrapped"] = True  # unpickling traces the code again, and not into this
    return made


def items(graph: fx.Graph, source: fx.Node, *names: str) -> list[fx.Node]:
    """Add the first results of a node that returns several, one for each name."""
    return [add_node(graph, operator.getitem, (source, i), name) for i, name in enumerate(names)]


def calls(graph: fx.Graph, target: Callable[..., Any]) -> list[fx.Node]:
    """Return the calls of a function, in execution order."""
    return list(graph.find_nodes(op="call_function", target=target))
