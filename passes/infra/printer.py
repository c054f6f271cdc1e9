"""A stable text form of fx graphs, for golden tests, dumps and error messages.

`GraphModule.print_readable` changes between torch releases and prints only what Python can run.
This prints one line per node, with names that say what a target *is* rather than where torch
happens to keep it:

    graph:
      0 %x : placeholder[x] -> [2, 4] float32
      1 %linear : call_function[F.linear](%x, %weight, None) -> [2, 8] float32  # layers.0.up

GraphModules inside the module follow under their path.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moeify.passes.infra.records import record_or_none
from moeify.units import dtype_name

_OPS = (type(torch.ops.aten.add), type(torch.ops.aten.add.default))
_MODULE_NAMES = {
    "_operator": "operator",
    "builtins": "",
    "torch._C._nn": "F",
    "torch._C._special": "torch.special",
    "torch._C._linalg": "torch.linalg",
    "torch._C._fft": "torch.fft",
    "torch.nn.functional": "F",
}


def target_name(target: Callable[..., Any] | str) -> str:
    """Name a node's target the same way in every torch release.

    Example:
        >>> target_name(torch.nn.functional.linear), target_name(torch.add)
        ('F.linear', 'torch.add')
    """
    if isinstance(target, str):
        return target
    if isinstance(target, _OPS):
        return str(target)
    name = getattr(target, "__name__", None)
    if not isinstance(name, str):
        return type(target).__name__
    module = getattr(target, "__module__", None)
    if not isinstance(module, str):
        return _method_name(target, name)
    prefix = _MODULE_NAMES.get(module)
    if prefix is None:
        prefix = "torch" if module.split(".")[0] == "torch" and hasattr(torch, name) else module
    return f"{prefix}.{name}" if prefix else name


def _method_name(target: object, name: str) -> str:
    """Name a function that C++ defines without a module: `torch.add`, `special.expit`."""
    owner = str(getattr(target, "__qualname__", name)).rpartition(".")[0]
    if owner.startswith("_Variable"):
        return f"torch.{name}"
    if owner in {"TensorBase", "Tensor", "_TensorBase"}:
        return f"Tensor.{name}"
    return f"{owner}.{name}" if owner else name


def print_graph(gm: GraphModule, *, numbers: bool = True, meta: bool = True) -> str:
    """Print a module's graph, then those of the GraphModules inside it.

    Args:
        gm: The module; its graph need not be valid.
        numbers: Number the lines. Leave out for texts that are to be compared line by line.
        meta: Print shapes, dtypes and module paths as well. Without them the text says only what
            the graph computes.

    Returns:
        The text, ending in a newline.

    Example:
        >>> from torch.fx import symbolic_trace
        >>> print(print_graph(symbolic_trace(torch.nn.Sequential(torch.nn.ReLU()))), end="")
        graph:
          0 %input_1 : placeholder[input]
          1 %_0 : call_module[0: ReLU](%input_1)
          2 %output : output[output](%_0)
    """
    return "\n".join(_lines(gm, numbers, meta)) + "\n"


def _lines(gm: GraphModule, numbers: bool, meta: bool) -> Iterator[str]:
    for path, module in gm.named_modules():
        if not isinstance(module, GraphModule):
            continue
        yield f"graph {path}:" if path else "graph:"
        nodes = list(module.graph.nodes)
        width = len(str(max(len(nodes) - 1, 0)))
        for number, node in enumerate(nodes):
            yield f"  {f'{number:>{width}} ' if numbers else ''}{format_node(node, meta=meta)}"


def format_node(node: Node, *, meta: bool = True) -> str:
    """Print one node on one line, without a number, as `print_graph` does."""
    target = target_name(node.target)
    if node.op == "call_module" and (module := _resolve(node)) is not None:
        target += f": {type(module).__name__}"
    parts = [_value(arg) for arg in node.args]
    parts += [f"{key}={_value(value)}" for key, value in node.kwargs.items()]
    args = f"({', '.join(parts)})" if parts or node.op.startswith("call") else ""
    text = f"%{node.name} : {node.op}[{target}]{args}"
    if not meta:
        return text
    result = _result(node)
    rec = record_or_none(node)
    where = f"  # {rec.module_path}" if rec is not None and rec.module_path else ""
    if rec is not None and rec.site is not None:
        where += f"  @ {rec.site}" + (f": {rec.role}" if rec.role else "")
    return text + (f" -> {result}" if result else "") + where


def diff_graphs(before: GraphModule | str, after: GraphModule | str) -> str:
    """Return a unified diff of two graphs; empty if their texts are equal.

    Args:
        before: A module, or the text of one by `print_graph(gm, numbers=False)`, where a pass works
            in place.
        after: Likewise.
    """
    old, new = (
        side if isinstance(side, str) else print_graph(side, numbers=False)
        for side in (before, after)
    )
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "before", "after", lineterm="")
    return "".join(f"{line}\n" for line in lines)


def _value(arg: object) -> str:
    """Print an argument without addresses, whatever it is."""
    match arg:
        case Node():
            return f"%{arg.name}"
        case enum.Enum():
            return f"{type(arg).__name__}.{arg.name}"
        case bool() | int() | float() | complex() | str() | None:
            return repr(arg)
        case torch.dtype():
            return dtype_name(arg)
        case torch.device() | torch.layout() | torch.memory_format():
            return str(arg).removeprefix("torch.")
        case torch.Tensor():
            return f"tensor{_tensor(arg)}"
        case slice():
            bounds = [arg.start, arg.stop] + ([] if arg.step is None else [arg.step])
            return ":".join("" if bound is None else _value(bound) for bound in bounds)
        case list():
            return f"[{', '.join(map(_value, arg))}]"
        case tuple():
            return f"({', '.join(map(_value, arg))}{',' if len(arg) == 1 else ''})"
        case dict():
            return f"{{{', '.join(f'{_value(k)}: {_value(v)}' for k, v in arg.items())}}}"
        case torch.SymInt() | torch.SymFloat() | torch.SymBool():
            return str(arg)
    if arg is ...:
        return "..."
    return target_name(arg) if callable(arg) else f"<{type(arg).__name__}>"


def _result(node: Node) -> str:
    """Describe what a node returns, by its record, its `val`, or the weight that it reads."""
    rec = record_or_none(node)
    if rec is not None and rec.shapes:
        kinds = [
            f"{list(shape)} {dtype}" for shape, dtype in zip(rec.shapes, rec.dtypes, strict=False)
        ]
        return kinds[0] if len(kinds) == 1 else f"({', '.join(kinds)})"
    value = node.meta.get("val", node.meta.get("tensor_meta"))
    if value is None and node.op == "get_attr":
        value = _resolve(node)
    return _described(value)


def _described(value: object) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _tensor(value)
    if isinstance(value, (tuple, list)) and value:
        return f"({', '.join(_described(item) or '-' for item in value)})"
    return ""


def _tensor(value: Any) -> str:
    sizes = ", ".join(str(size) for size in value.shape)
    return f"[{sizes}] {dtype_name(value.dtype)}"


def _resolve(node: Node) -> object | None:
    """Return the module or attribute that a node names, or None."""
    found: object = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found
