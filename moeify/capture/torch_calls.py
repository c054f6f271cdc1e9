"""Classify single torch calls: metadata only, writing in place, and the graph node they become."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moeify import compat

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

METADATA = frozenset(
    "size dim ndimension numel nelement stride storage_offset element_size data_ptr get_device "
    "is_contiguous is_floating_point is_complex is_signed is_inference is_pinned is_shared "
    "is_sparse untyped_storage storage __len__ __hash__ __repr__ __format__ dim_order "
    "requires_grad_ retain_grad register_hook is_same_size is_conj is_neg result_type "
    "broadcast_shapes promote_types can_cast finfo iinfo __set__ __dir__ is_tensor is_storage "
    "_has_compatible_shallow_copy_type has_names sym_size sym_stride sym_numel sym_storage_offset "
    "sym_is_contiguous device layout".split()
)
"""Calls that neither read values nor return tensors, and do not become nodes."""

_IN_PLACE = frozenset(
    "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __ipow__ __iand__ __ior__ "
    "__ixor__ __ilshift__ __irshift__ __imod__".split()
)


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples, sets, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from tensors_in(part)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name, None))


def written_by(name: str, args: Args, kwargs: Kwargs) -> Tensor | None:
    """Return the tensor that a call writes to, or None."""
    out = kwargs.get("out")
    if isinstance(out, Tensor):
        return out
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    if in_place or kwargs.get("inplace") is True:
        return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    return None


def target_of(func: Callable[..., Any], name: str, args: Args) -> tuple[str, Any]:
    """Return (op, target) of the node for a call of `func`."""
    kind = type(func).__name__
    if compat.base_name(func)[0]:
        return "call_function", func
    if name == "__getitem__":
        return "call_function", operator.getitem
    if name == "__setitem__":
        return "call_function", operator.setitem
    if kind in ("method_descriptor", "wrapper_descriptor") and args and isinstance(args[0], Tensor):
        return "call_method", name
    if getattr(torch.Tensor, name, None) is func:
        return "call_method", name
    if kind == "function" and getattr(func, "__module__", "") == "torch._tensor":
        # `x ** 2` runs a wrapper that is called `pow` and is an attribute `__pow__` of tensors.
        found = next((key for key, value in vars(torch.Tensor).items() if value is func), None)
        if found is not None:
            return "call_method", found
    return "call_function", func


class FunctionCall:
    """The target of a node that applies an `autograd.Function`."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.__name__ = f"{function.__name__}_apply"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)
