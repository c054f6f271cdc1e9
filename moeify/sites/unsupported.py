"""Refuse what cannot be converted because of its weights: quantised ones, and those with adapters.

Libraries are recognised by the names of their classes; none of them is imported.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from moeify.capture.capture import ExampleInputs
from moeify.errors import CaptureError, UnsupportedModuleError
from moeify.sites.discovery import Discovery, discover
from moeify.units import dtype_from_name, dtype_name

_LIBRARIES = frozenset(
    "torchao bitsandbytes optimum hqq gptqmodel auto_gptq awq compressed_tensors aqlm eetq".split()
)
_CLASSES = frozenset(
    "Params4bit Int8Params Linear4bit Linear8bitLt QuantLinear HQQLinear QLinear FP8Linear".split()
)
_DTYPES = frozenset(
    map(dtype_from_name, ("int8", "uint8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"))
)
_PACKED = frozenset(("qweight", "weight_packed", "W_q"))


def _quantised(module: nn.Module) -> str | None:
    """Return how a module's own weights are quantised; None if they are not."""
    for name, value in (*module._parameters.items(), *module._buffers.items()):
        if value is None:
            continue
        if (kind := _foreign(value)) or hasattr(value, "quant_state"):
            return f"its {name} is quantised ({kind or type(value).__name__})"
        if (value.dim() >= 2 and value.dtype in _DTYPES) or name in _PACKED:
            return f"its {name} is quantised ({dtype_name(value.dtype)})"
    if kind := _foreign(module):
        return f"its weights are quantised ({kind})"
    if isinstance(getattr(module, "_packed_params", None), nn.Module):
        return "its weights are quantised"
    return None


def _foreign(value: Tensor | nn.Module) -> str | None:
    """Return the name of the quantisation library's class that a weight or module has."""
    for kind in type(value).__mro__:
        if kind.__module__.split(".")[0] in _LIBRARIES or kind.__name__ in _CLASSES:
            return kind.__name__
    return None


def refuse_quantised(model: nn.Module, weights: Iterable[str] | None = None) -> None:
    """Refuse quantised weights among these parameters, or in the whole model if None.

    Raises:
        UnsupportedModuleError: One is quantised.
    """
    if weights is None:
        modules = list(model.named_modules())
    else:
        paths = dict.fromkeys(name.rpartition(".")[0] for name in weights)
        modules = [(path, model.get_submodule(path)) for path in paths]
    for path, module in modules:
        if (why := _quantised(module)) is not None:
            raise UnsupportedModuleError(
                path or type(module).__name__, f"{why}: convert the float model, then quantise"
            )


def discover_float(model: nn.Module, example_inputs: ExampleInputs) -> Discovery:
    """Find a model's sites; if there are none, or it does not run, blame quantised weights."""
    try:
        discovery = discover(model, example_inputs)
    except CaptureError:
        refuse_quantised(model)
        raise
    if not discovery.sites:
        refuse_quantised(model)
    return discovery


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model with PEFT adapters: they would not follow the weights they adapt."""
    found = [
        (path, module)
        for path, module in model.named_modules()
        if any(kind.__module__.split(".")[0] == "peft" for kind in type(module).__mro__)
    ]
    if found:
        layers = [pair for pair in found if hasattr(pair[1], "base_layer")]
        path, module = (layers or found)[0]
        raise UnsupportedModuleError(
            path or type(module).__name__,
            f"it has a PEFT adapter ({type(module).__name__}): convert the dense model first, then "
            "add adapters; or merge them first, with model.merge_and_unload()",
        )
