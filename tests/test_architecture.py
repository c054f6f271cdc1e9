"""Imports point down: a room imports itself and the rooms below it, and no modules form a circle.

Imports inside functions count like any other; those under `TYPE_CHECKING` do not. The rooms and
what each is for: `docs/architecture.md`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import moeify

FLOORS = """
    errors version units atomic_file compat
    kernels passes.infra plan capture
    distributed storage
    nn hf
    passes.match
    sites
    init tensor_parallel
    zero
    passes.rewrite passes.testing passes
    train
    convert graph_export
    checkpoint distillation
    formats
    api reporting
    simulate
    cli
"""
"""Lowest first, within a floor too."""

ORDER = {room: place for place, room in enumerate(FLOORS.split())}
FOLDERS = {"moeify": "moeify", "passes": "moeify.passes", "kernels": "moeify.kernels"}


def modules_in(root: Path) -> dict[str, Path]:
    """Return every module of the three folders by its dotted name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            if any(parent.is_symlink() for parent in path.parents):
                continue
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports_of(path: Path) -> Iterator[str]:
    """Yield the names that a file imports, wherever the import stands."""
    stack: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        stack.extend(ast.iter_child_nodes(node))


def import_graph(root: Path) -> nx.DiGraph[str]:
    """Return who imports whom. The face of the package hands names on and is left out."""
    found = modules_in(root)
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(name for name in found if name != "moeify")
    for name in graph:
        targets = {target for target in imports_of(found[name]) if target in graph}
        graph.add_edges_from((name, target) for target in targets - {name})
    return graph


def room_of(module: str) -> str:
    """Return the room of a module: `passes.match` for `moeify.passes.match.placement`."""
    parts = module.split(".")[1:]
    return next((r for r in (".".join(parts[:2]), parts[0]) if r in ORDER), parts[0])


def arrows_up(graph: nx.DiGraph[str]) -> list[str]:
    """Return the imports that point to a higher room."""
    up = []
    for module, target in graph.edges:
        own, other = room_of(module), room_of(target)
        if ORDER[own] < ORDER[other]:
            up.append(f"{module} -> {target}")
    return sorted(up)


def circles(graph: nx.DiGraph[str]) -> list[list[str]]:
    """Return the sets of modules that import each other."""
    return [sorted(found) for found in nx.strongly_connected_components(graph) if len(found) > 1]


@pytest.fixture(scope="module")
def graph(repo: Path) -> nx.DiGraph[str]:
    """Who imports whom, in this tree."""
    found = import_graph(repo)
    assert len(found) > 150
    assert found.number_of_edges() > 500
    return found


def test_every_room_has_a_floor(graph):
    assert {room_of(module) for module in graph} <= set(ORDER)


def test_imports_point_down(graph):
    assert arrows_up(graph) == []


def test_no_circle(graph):
    assert circles(graph) == []


def test_every_room_is_described(repo, graph):
    page = (repo / "docs" / "architecture.md").read_text(encoding="utf-8")
    missing = [room for room in ORDER if f"`{room.replace('.', '/')}" not in page]
    assert missing == []


def test_no_room_hides_a_public_name(graph):
    """Importing `moeify.export.graph` would set `moeify.export` to that folder, for everybody."""
    assert {room_of(module) for module in graph} & set(moeify.__all__) == set()


def test_an_arrow_up_is_seen(tmp_path):
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    rooms = {"plan": "import moeify.zero.apply", "zero": "from moeify.plan import rules"}
    for room, (file, text) in zip(
        rooms, {"rules.py": rooms["plan"], "apply.py": rooms["zero"]}.items(), strict=True
    ):
        (tmp_path / "moeify" / room).mkdir()
        (tmp_path / "moeify" / room / file).write_text(f"def late():\n    {text}\n")
    found = import_graph(tmp_path)
    assert arrows_up(found) == ["moeify.plan.rules -> moeify.zero.apply"]
    assert circles(found) == [["moeify.plan.rules", "moeify.zero.apply"]]
