"""The typed record that moeify keeps on graph nodes.

Capture writes one record per node: where in the model the node comes from, which parameters it
reads, what it returns. Analysis passes add facts to it (`site`, `role`). No other file touches
the key in `node.meta`, so that what a pass knows about a node always has a type.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

_KEY = "moeify"


@dataclass(frozen=True, slots=True)
class ParamRef:
    """One parameter or buffer that a node reads."""

    name: str  # in the model, such as `model.layers.0.mlp.up_proj.weight`
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """What is known about one node.

    Args:
        module_path: The innermost module that ran the node, such as `layers.0.mlp`; `""` is the
            model itself.
        modules: The paths of all modules that were running, outermost first.
        params: The parameters and buffers that the node reads.
        shapes: Shape of each tensor that the node returns.
        dtypes: Dtype of each of these tensors, such as `float32`.
        call: Which call of the module this is, from 0; a shared module runs more than once.
        mutates: The node writes to one of its inputs.
        grad: The node ran with gradients on; always, where they were not recorded.
        site: Name of the site that the node belongs to, once found.
        role: What the node is in its site, such as `up` or `activation`.
    """

    module_path: str
    modules: tuple[str, ...] = ()
    params: tuple[ParamRef, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    call: int = 0
    mutates: bool = False
    grad: bool = True
    site: str | None = None
    role: str | None = None


def record_of(node: Node) -> NodeRecord | None:
    """Return the record of a node, or None where there is none.

    Raises:
        TypeError: Something other than a record is under moeify's key.
    """
    found = node.meta.get(_KEY)
    if found is None or isinstance(found, NodeRecord):
        return found
    raise TypeError(f"%{node.name}: expected a NodeRecord in node.meta, found {type(found)!r}")


def record_or_none(node: Node) -> NodeRecord | None:
    """Return the record of a node; None too where it is broken, which the verifier reports."""
    try:
        return record_of(node)
    except TypeError:
        return None


def module_path_of(node: Node) -> str:
    """Return the innermost module that ran a node; "" for the model itself, or without a record."""
    record = record_of(node)
    return "" if record is None else record.module_path


def set_record(node: Node, rec: NodeRecord) -> None:
    """Give a node its record, replacing the one it may have."""
    node.meta[_KEY] = rec


def update_record(node: Node, **changes: Any) -> NodeRecord:
    """Change fields of a node's record; a node without one gets one with an empty module path.

    Raises:
        TypeError: A name in `changes` is not a field of `NodeRecord`.

    Example:
        >>> from torch.fx import Graph
        >>> node = Graph().placeholder("x")
        >>> update_record(node, site="layers.0.mlp", role="input").role
        'input'
    """
    rec = replace(record_of(node) or NodeRecord(module_path=""), **changes)
    set_record(node, rec)
    return rec


def mark(node: Node, **changes: Any) -> bool:
    """Change fields of a node's record as `update_record` does, and return whether they differed.

    This is what an analysis returns as `modified`.

    Example:
        >>> from torch.fx import Graph
        >>> node = Graph().placeholder("x")
        >>> mark(node, site="layers.0.mlp", role="input")
        True
        >>> mark(node, site="layers.0.mlp", role="input")
        False
    """
    before = record_of(node)
    return update_record(node, **changes) != before
