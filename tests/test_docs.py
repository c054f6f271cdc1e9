"""Run what the documentation shows: Python blocks, plans in YAML, and examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(
    f"moeify.{prefix}{path.stem}"
    for folder, prefix in (("moeify", ""), ("passes", "passes."), ("kernels", "kernels."))
    for path in (ROOT / folder).glob("*.py")
    if path.stem not in ("__init__", "__main__")
)

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^ *```", re.M | re.S)
_SKIP = re.compile(r"<!--\s*skip:\s*(?P<reason>.*?)\s*-->\s*\Z", re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    skip: str | None

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page. `<!-- skip: reason -->` right before one marks it."""
    if not page.exists():
        return []
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in _FENCE.finditer(text):
        skip = _SKIP.search(text[: match.start()])
        body = re.sub(rf"^{match['indent']}", "", match["body"], flags=re.M)
        line = text.count("\n", 0, match.start()) + 2
        reason = skip["reason"] if skip else None
        blocks.append(Block(page, line, match["language"], body, reason))
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
PLANS = [b for b in BLOCKS if b.language == "yaml" and b.text.startswith("version:")]


@pytest.fixture(scope="module")
def pages() -> Iterator[dict[Path, ModuleType]]:
    """A module for each page that its blocks share, registered as dataclasses expect."""
    made = {page: ModuleType(f"docs_{page.stem.replace('-', '_')}") for page in PAGES}
    sys.modules.update({module.__name__: module for module in made.values()})
    yield made
    for module in made.values():
        del sys.modules[module.__name__]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("docs")


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.id)
def test_python(block, pages, folder, monkeypatch):
    if block.skip is not None:
        pytest.skip(block.skip)
    cwd = folder / block.page.stem
    cwd.mkdir(exist_ok=True)
    monkeypatch.chdir(cwd)
    # Blank lines before the code make tracebacks show the page's own line numbers.
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
    exec(code, vars(pages[block.page]))


@pytest.mark.parametrize("block", PLANS, ids=lambda block: block.id)
def test_plans(block):
    if block.skip is not None:
        pytest.skip(block.skip)
    from moeify.plan.plan import Plan

    assert isinstance(Plan.loads(block.text), Plan)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("triton", "matplotlib"):
            pytest.skip(f"{name} needs {error.name}")
        raise
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_blocks_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```python\na = 1\n```\n\n<!-- skip: needs two GPUs -->\n\n```python\nb\n```\n"
        "\n- item\n\n  ```yaml\n  version: 1\n  ```\n"
    )
    first, second, third = blocks_of(page)
    assert (first.line, first.text, first.skip) == (4, "a = 1\n", None)
    assert (second.line, second.skip) == (10, "needs two GPUs")
    assert (third.language, third.text) == ("yaml", "version: 1\n")
