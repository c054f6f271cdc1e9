"""`README.md` of a converted folder: what it is made of, how it was made, how it is loaded.

Names, the plan and the source's card are untrusted: they are written to YAML and JSON by their
writers, and to Markdown inside fences that are longer than any fence in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from moeify.errors import MoeifyError
from moeify.plan import strict_yaml
from moeify.plan.layer_description import LayerDescription

_MAX_CARD: Final = 1 << 20
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_LOAD: Final = {
    "native": """\
from transformers import {auto}

model = {auto}.from_pretrained("path/of/this/folder")
""",
    "custom": """\
from transformers import {auto}  # needs: pip install moeify

model = {auto}.from_pretrained("path/of/this/folder", trust_remote_code=True)
""",
    "moeify": """\
import moeify

model = moeify.load("path/of/this/folder")
""",
}


def model_card(
    *,
    kind: str,
    plan: Mapping[str, Any],
    layers: Sequence[tuple[LayerDescription, bool]],
    source: Path,
    sha256: Mapping[str, str],
    total: int,
    active: int,
    auto: str,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> bytes:
    """Return the card's text.

    `layers` says of each layer whether it computes what the dense one does, `source` is the folder
    of the dense model, `sha256` has the digests of its tensor files by name; `total` and `active`
    count parameters, and `auto` is the Auto class that loads the model.
    """
    exact = all(same for _, same in layers)
    lines = [
        "---",
        *_front_matter(source, kind),
        "---",
        "",
        "# A Mixture-of-Experts model",
        "",
        "Converted from a dense model by [moeify](https://pypi.org/project/moeify/): "
        f"{len(layers)} MLPs became MoE layers.",
        "",
        "|  |  |",
        "|---|---|",
        f"| source | {_code(source.resolve().name)} |",
        *(f"| SHA-256 of {_code(name)} | `{digest}` |" for name, digest in sha256.items()),
        f"| parameters | {total:,} |",
        f"| parameters that a token uses | {active:,} |",
        "| outputs before training | "
        + ("those of the dense model |" if exact else "not those of the dense model |"),
        "",
        "## Load",
        "",
        *_fenced(_LOAD[kind].format(auto=auto), "python"),
        "",
        *_warnings(warnings),
        "## Layers",
        "",
        *_layer_table(layers),
        "",
        "## Plan",
        "",
        *_fenced(strict_yaml.dump(dict(plan), "plan.yaml"), "yaml"),
    ]
    if notes:
        lines += ["", "## Notes", "", *_fenced("\n".join(notes), "text")]
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


def _warnings(warnings: Sequence[str]) -> list[str]:
    if not warnings:
        return []
    return ["## Before you train it", "", *_fenced("\n".join(warnings), "text"), ""]


def _layer_table(layers: Sequence[tuple[LayerDescription, bool]]) -> list[str]:
    return [
        "| layer | experts | a token uses | residual | starts from | as the dense one |",
        "|---|---|---|---|---|---|",
        *(
            f"| {_code(layer.name)} | {layer.experts} | {layer.top_k} "
            f"| {layer.residual} | {layer.init.experts} "
            f"| {'yes' if same else 'no'} |"
            for layer, same in layers
        ),
    ]


def _front_matter(source: Path, kind: str) -> list[str]:
    """Return the lines between the dashes, with licence and name if the source states them."""
    stated = _source_front_matter(source)
    library = "moeify" if kind == "moeify" else "transformers"
    data: dict[str, Any] = {"library_name": library, "tags": ["moe", "moeify"]}
    for key in ("license", "license_name", "license_link"):
        value = stated.get(key)
        if isinstance(value, str) and value.isprintable() and len(value) <= 200:
            data[key] = value
    index = stated.get("model-index")
    first = index[0] if isinstance(index, list) and index else {}
    base = stated.get("model_name") or (first.get("name") if isinstance(first, dict) else None)
    if isinstance(base, str) and _PLAIN.fullmatch(base):
        data["base_model"] = base
    return [f"{key}: {_scalar(value)}" for key, value in data.items()]


def _scalar(value: Any) -> str:
    """Write a value in one line; JSON is YAML, so that nothing in it can end the front matter."""
    plain = isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9.-]*[a-z0-9]", value)
    if plain and value not in ("true", "false", "null", "yes", "no", "on", "off"):
        return str(value)
    return json.dumps(value)


def _source_front_matter(source: Path) -> dict[str, Any]:
    """Return the front matter of a folder's card; empty if none can be read."""
    try:
        with (source / "README.md").open("rb") as stream:
            text = stream.read(_MAX_CARD).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    match = re.match(r"---\r?\n(.*?)\r?\n---\s*(?:\n|\Z)", text, re.S)
    if match is None:
        return {}
    try:
        data, _ = strict_yaml.load(match[1], "README.md")
    except (MoeifyError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _fenced(text: str, language: str) -> list[str]:
    """Return lines in a fence that nothing in them can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", text.rstrip("\n"), fence]


def _code(text: str) -> str:
    """Return a name as inline code for a table cell."""
    plain = "".join(c if c.isprintable() else "?" for c in text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall(r"`+", plain)), default=0)
    ticks = "`" * (longest + 1)
    space = " " if "`" in plain else ""
    return f"{ticks}{space}{plain}{space}{ticks}"
