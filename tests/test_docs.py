"""Run what the documentation shows: Python blocks, plans in YAML, and examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = {"moeify": "moeify", "passes": "moeify.passes", "kernels": "moeify.kernels"}


def modules_in(folder: str, package: str) -> list[str]:
    """The modules below a folder, by dotted name. Links into the other folders are left out."""
    root = ROOT / folder
    names = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if path.stem != "__main__" and not any(parent.is_symlink() for parent in path.parents):
            names.append(".".join([package, *parts]).removesuffix(".__init__"))
    return names


MODULES = [name for folder, package in FOLDERS.items() for name in modules_in(folder, package)]

_PATH = re.compile(r"`(?P<path>[\w.-]+/[\w./-]*)`")
_NAME = re.compile(r"`(?:python -m )?(?P<name>(?:moeify|mf|tests|benchmarks)(?:\.\w+)+)[`( ]")
_LINK = re.compile(r"\]\((?P<path>[^)#:]+)(?:#[^)]*)?\)")
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


def unknown_paths(text: str) -> list[str]:
    """Paths in backticks that begin with a folder of the repository or a room, and lead nowhere."""
    bases = (ROOT, ROOT / "moeify")
    named = {match["path"] for match in _PATH.finditer(text)}
    ours = {path for path in named if any((b / path.split("/")[0]).is_dir() for b in bases)}
    return sorted(path for path in ours if not any((base / path).exists() for base in bases))


def unknown_names(text: str) -> list[str]:
    """Dotted names in backticks that are neither a module nor an attribute of one."""
    named = {match["name"] for match in _NAME.finditer(text)}
    return sorted(name for name in named if not name.endswith(".json") and not _resolves(name))


def _resolves(name: str) -> bool:
    first, *rest = name.split(".")
    if first not in ("moeify", "mf"):  # not imported: benchmarks need more than the tests do
        path = ROOT.joinpath(first, *rest)
        return path.is_dir() or path.with_suffix(".py").is_file()
    try:
        pkgutil.resolve_name(".".join(["moeify", *rest]))
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_paths_and_names_exist(page):
    text = page.read_text(encoding="utf-8")
    assert unknown_paths(text) == []
    assert unknown_names(text) == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_links_exist(page):
    linked = {match["path"] for match in _LINK.finditer(page.read_text(encoding="utf-8"))}
    assert sorted(path for path in linked if not (page.parent / path).exists()) == []


def test_what_does_not_exist_is_found():
    paths = "`passes/infra/base.py` `passes/base.py` `plan/deepspeed` `plan/nothing` `any/thing`"
    assert unknown_paths(paths) == ["passes/base.py", "plan/nothing"]
    names = "`moeify.errors.PlanError` `moeify.plans` `mf.save(model)` `mf.nothing` `moeify.json`"
    assert unknown_names(names) == ["mf.nothing", "moeify.plans"]
    commands = "`python -m tests.kernels.aot` `python -m benchmarks.nothing --all`"
    assert unknown_names(commands) == ["benchmarks.nothing"]


def test_doctests_are_found_in_every_room():
    assert {"moeify.plan.plan", "moeify.passes.infra.base", "moeify.kernels.gate"} <= set(MODULES)
    assert len(MODULES) == len(set(MODULES)) > 150


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
