"""What begins with an underscore stays in its module."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ("moeify", "passes", "kernels")
USERS = ("tests", "benchmarks", "examples")

FOREIGN = {
    "_buffers": "nn.Module",
    "_modules": "nn.Module",
    "_parameters": "nn.Module",
    "_replace": "namedtuple",
    "_spec": "DTensor, in compat.py",
    "_version": "Tensor",
}
"""Names of others that some module of ours happens to define as well."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def parsed(text: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(text)))


@functools.cache
def modules(*folders: str) -> dict[Path, list[ast.AST]]:
    """Return the nodes of the modules of some folders; links to folders are not followed."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(part.is_symlink() for part in path.parents):
                found[path] = parsed(path.read_text())
    return found


def is_ours(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == "moeify"


def private_imports(tree: list[ast.AST]) -> Iterator[tuple[int, str, str]]:
    """Yield the line, module and name of each private name that is imported from us."""
    for node in tree:
        if isinstance(node, ast.ImportFrom) and is_ours(node.module):
            for alias in node.names:
                if is_private(alias.name):
                    yield node.lineno, str(node.module), alias.name


def defined(tree: list[ast.AST]) -> set[str]:
    """Return every private name that a module defines, for itself or for its objects."""
    found = set()
    for node in tree:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                found.add(name)
            case ast.Call(args=[_, ast.Constant(value=str(name)), _]):  # object.__setattr__
                found.add(name)
    return {name for name in found if is_private(name)}


def our_modules(tree: list[ast.AST]) -> set[str]:
    """Return the names under which a file knows modules of ours."""
    found = set()
    for node in tree:
        if isinstance(node, ast.ImportFrom) and is_ours(node.module):
            for alias in node.names:
                path = f"{node.module}.{alias.name}".split(".")[1:]
                tops = {"passes", "kernels"}
                place = ROOT.joinpath(*path) if path[0] in tops else ROOT.joinpath("moeify", *path)
                if place.with_suffix(".py").exists() or place.is_dir():
                    found.add(alias.asname or alias.name)
    return found


def test_private_names_are_not_imported():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module}.{name}"
        for path, tree in (modules(*LIBRARY) | modules(*USERS)).items()
        for line, module, name in private_imports(tree)
    ]
    assert not wrong, wrong


def test_private_names_of_modules_and_objects_are_not_used_elsewhere():
    trees = modules(*LIBRARY)
    names = {path: defined(tree) for path, tree in trees.items()}
    owners: dict[str, list[str]] = {}
    for path, own in names.items():
        for name in own:
            owners.setdefault(name, []).append(path.stem)
    wrong = []
    for path, tree in trees.items():
        own, known = names[path], our_modules(tree) - {path.stem}
        for node in tree:
            if not isinstance(node, ast.Attribute) or not is_private(node.attr):
                continue
            of_module = isinstance(node.value, ast.Name) and node.value.id in known
            of_object = node.attr in owners and node.attr not in own | FOREIGN.keys()
            if of_module or of_object:
                owner = ", ".join(owners.get(node.attr, ["?"]))
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                wrong.append(f"{where}: {ast.unparse(node)} (of {owner})")
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from moeify.plan.plan import _x", ["_x"]),
        ("def f():\n    from moeify.passes.infra.base import _x, y", ["_x"]),
        ("from moeify.kernels import combine as _combine", []),
        ("from moeify import __version__", []),
        ("from torch import _x", []),
    ],
)
def test_an_import_is_seen(code, names):
    assert [name for _, _, name in private_imports(parsed(code))] == names


def test_definitions_are_seen():
    tree = parsed("_A = 1\nclass B:\n    _c: int\n    def _d(self): self._e = f._g\n")
    assert defined(tree) == {"_A", "_c", "_d", "_e"}
