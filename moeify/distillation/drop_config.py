"""Where a model states its depth besides its layers: configs, and plain attributes of its modules.

Configs are replaced by changed copies, because several models may share one. Fields that count
layers are recognised by name and value; `same_tree` then compares the shortened model with one
built from the new config, so that a field that was missed is an error and not a wrong model.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from moeify.errors import UnsupportedModuleError

_DEPTH: Final = re.compile(
    r"(num_|n_)?((hidden|encoder|decoder|text|vision|transformer)_)*(layers?|blocks|depth)"
)
_POSITION: Final = re.compile(r"layer|block|idx|index|depth|position|number")
_PER_LAYER: Final = re.compile(r"layer|block|attention|rope|window")
_PLAIN: Final = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class Cut:
    """Which layers of a stack stay; every stack of a model has one, whole ones too."""

    path: str  # of the container
    count: int  # layers before
    kept: tuple[int, ...]  # ascending positions
    role: str = ""  # "encoder" or "decoder"


def shorten_modules(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """Take layers out of their containers, in place, and renumber what counts them."""
    _configs(model, cuts)
    for cut in cuts:
        container = model.get_submodule(cut.path)
        layers = dict(container._modules)
        positions = _positions([layer for layer in layers.values() if layer is not None])
        old = list(layers)
        names = [str(i) for i in range(len(cut.kept))]
        if old != [str(i) for i in range(cut.count)]:
            names = [old[i] for i in cut.kept]  # a Sequential with custom names
        container._modules.clear()
        for now, (name, at) in enumerate(zip(names, cut.kept, strict=True)):
            layer = layers[old[at]]
            assert layer is not None
            container._modules[name] = layer
            modules = dict(layer.named_modules())
            for path, key, offset in positions:
                if path in modules and key in modules[path].__dict__:
                    modules[path].__dict__[key] = now + offset
        for path, module in model.named_modules():
            around = not path or cut.path == path or cut.path.startswith(f"{path}.")
            single = sum(other.path.startswith(f"{path}.") or not path for other in cuts) < 2
            for key, value in list(module.__dict__.items()):
                if around and single and type(value) is int and value == cut.count:
                    module.__dict__[key] = len(cut.kept) if _DEPTH.fullmatch(key) else value


def _positions(layers: Sequence[nn.Module]) -> list[tuple[str, str, int]]:
    """Return (module in the layer, attribute, offset) of integers that follow the position."""
    values: dict[tuple[str, str], dict[int, int]] = {}
    for at, layer in enumerate(layers):
        for path, module in layer.named_modules():
            for key, value in module.__dict__.items():
                if type(value) is int and _POSITION.search(key):
                    values.setdefault((path, key), {})[at] = value
    found = []
    for (path, key), seen in values.items():
        offsets = {value - at for at, value in seen.items()}
        if len(seen) > 1 and len(offsets) == 1:
            found.append((path, key, offsets.pop()))
    return found


# -- configs


def _is_config(value: object) -> bool:
    return hasattr(value, "to_json_string") and hasattr(value, "model_type")


def _configs(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """Replace the configs of a model by copies with the new depths."""
    holders: dict[int, tuple[Any, list[tuple[str, nn.Module, str]]]] = {}
    for path, module in model.named_modules():
        for key, value in module.__dict__.items():
            if _is_config(value):
                holders.setdefault(id(value), (value, []))[1].append((path, module, key))
    if not holders:
        return
    old = [value for value, _ in holders.values()]
    new = copy.deepcopy(old)  # at once: parts of one config stay parts of its copy
    for config, (_, places) in zip(new, holders.values(), strict=True):
        top = min((path for path, _, _ in places), key=len)
        below = [c for c in cuts if not top or c.path == top or c.path.startswith(f"{top}.")]
        for cut in below:
            fields = config.__dict__
            fields.update(_changes(fields, cut, alone=len(below) == 1))
        for _, module, key in places:
            module.__dict__[key] = config


def _changes(fields: Mapping[str, Any], cut: Cut, *, alone: bool) -> dict[str, Any]:
    """Return the fields of a config that state the depth of a stack, with their new values."""
    found: dict[str, Any] = {}
    other = {"encoder": "decoder", "decoder": "encoder"}.get(cut.role)
    for key, value in fields.items():
        named = "encoder" in key or "decoder" in key
        if other is not None and other in key:
            continue
        if not named and not alone and cut.role == "decoder":
            continue  # an unnamed number is the encoder's
        if type(value) is int and value == cut.count and _DEPTH.fullmatch(key):
            found[key] = len(cut.kept)
        elif isinstance(value, list | tuple) and value and _PER_LAYER.search(key):
            if _are_positions(value, cut.count):
                now = {at: i for i, at in enumerate(cut.kept)}
                found[key] = type(value)(now[at] for at in value if at in now)
            elif len(value) == cut.count and key != "attention_types":
                found[key] = type(value)(value[at] for at in cut.kept)
    if "attention_types" in fields and "attention_layers" in found:
        found["attention_types"] = [[list(found["attention_layers"]), 1]]  # pattern, repeats
    return found


def _are_positions(value: Sequence[Any], count: int) -> bool:
    if not all(type(at) is int and 0 <= at < count for at in value):
        return False
    return all(a < b for a, b in itertools.pairwise(value))


# -- the proof


def same_tree(model: nn.Module, built: nn.Module, cuts: Sequence[Cut]) -> None:
    """Check that a shortened dense model is what its new config builds.

    Raises:
        UnsupportedModuleError: A module, a tensor's shape, or what makes a layer unlike the others
            differs: a config cannot express this choice of layers.
    """
    ours, theirs = dict(model.named_modules()), dict(built.named_modules())
    for path in sorted(ours.keys() ^ theirs.keys()):
        raise _differs(path, "is" if path in ours else "is not", "there in this choice of layers")
    for path, module in ours.items():
        other = theirs[path]
        # By name: a parametrized module has a class of its own.
        if type(module).__qualname__ != type(other).__qualname__:
            raise _differs(path, f"is a {type(module).__name__}, not", type(other).__name__)
        shapes = [
            {key: tuple(p.shape) for key, p in m._parameters.items() if p is not None}
            for m in (module, other)
        ]
        if shapes[0] != shapes[1]:
            raise _differs(path, f"has parameters of {shapes[0]}, not", str(shapes[1]))
    for cut in cuts:
        for path, key, now, expected in _unlike(model, built, cut):
            raise _differs(path, f"has {key} = {now!r}, not", repr(expected))


def _unlike(
    model: nn.Module, built: nn.Module, cut: Cut
) -> Iterator[tuple[str, str, object, object]]:
    """Yield attributes that distinguish the layers of a stack and differ between the models."""
    rows = [list(m.get_submodule(cut.path).named_children()) for m in (model, built)]
    tables: list[dict[tuple[str, str], list[object]]] = [{}, {}]
    for row, table in zip(rows, tables, strict=True):
        for at, (_, layer) in enumerate(row):
            for path, module in layer.named_modules():
                for key, value in module.__dict__.items():
                    if isinstance(value, _PLAIN) and key != "training" and key[:1] != "_":
                        table.setdefault((path, key), [_MISSING] * len(row))[at] = value
    for place in tables[0].keys() & tables[1].keys():
        ours, theirs = tables[0][place], tables[1][place]
        if ours != theirs and (len(set(ours)) > 1 or len(set(theirs)) > 1):
            pairs = enumerate(zip(ours, theirs, strict=True))
            at = next(i for i, pair in pairs if len({*pair}) > 1)
            path, key = place
            where = f"{cut.path}.{rows[0][at][0]}"
            yield f"{where}.{path}" if path else where, key, ours[at], theirs[at]


_MISSING: Final = "nothing"


def _differs(path: str, verb: str, rest: str) -> UnsupportedModuleError:
    return UnsupportedModuleError(
        path or "the model",
        f"{verb} {rest}, as the config with fewer layers has it: keep other layers, which a config "
        "can express",
    )
