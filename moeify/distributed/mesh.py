"""The device meshes of a layout: one for dense layers, one for each number of expert ranks.

Collective: every rank of the world makes the same meshes in the same order. moeify never starts
`torch.distributed`; without it there is no mesh and one process does everything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from moeify import compat
from moeify.distributed.cost_model import local_ranks
from moeify.distributed.layout import Layout
from moeify.errors import PlanError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["World", "alone", "is_running", "node_size", "world_size"]


_alone: ContextVar[bool] = ContextVar("_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Let this process convert a model for itself, whatever other ranks do meanwhile."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def is_running() -> bool:
    """Tell whether there are ranks to work with: `torch.distributed` runs, and not `alone`."""
    return dist.is_available() and dist.is_initialized() and not _alone.get()


def world_size() -> int:
    """Return the number of ranks; 1 where there are none to work with."""
    return dist.get_world_size() if is_running() else 1


def node_size(world: int) -> int:
    """Return how many ranks share a node: torchrun's LOCAL_WORLD_SIZE, else the whole world."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return local if 0 < local <= world else world


@dataclass(slots=True)
class World:
    """The meshes of one layout on this rank."""

    layout: Layout
    rank: int
    dense: DeviceMesh  # ("dp", "tp")
    node: int  # ranks per node
    device_type: str  # "cpu" or "cuda"
    _sparse: dict[int, DeviceMesh] = field(default_factory=dict)
    _nodes: dict[int, DeviceMesh | None] = field(default_factory=dict)
    _reducing: dict[tuple[int, ...], str] = field(default_factory=dict)

    @classmethod
    def create(cls, layout: Layout, device_type: str = "cpu", mesh: Any = None) -> World:
        """Make the dense mesh, or check the user's own `mesh`; sparse ones follow on demand.

        Raises:
            PlanError: The user's mesh has other dimensions, sizes or another order of ranks.
        """
        if mesh is None:
            mesh = _mesh(device_type, torch.tensor(layout.dense_grid()), ("dp", "tp"))
        else:
            _check_mesh(mesh, layout)
        return cls(layout, dist.get_rank(), mesh, node_size(layout.world), device_type)

    def prepare(self, experts: Iterable[int]) -> None:
        """Make the meshes of layers with these numbers of experts."""
        # Now: later, one rank could fail in a pass while another waits for it in a new group.
        for count in experts:
            self.sparse(count)
            self.staged(count)

    def sparse(self, experts: int) -> DeviceMesh:
        """Return the mesh ("edp", "ep", "etp") of a layer with that many experts."""
        size = self.layout.ep(experts)
        if size not in self._sparse:
            grid = torch.tensor(self.layout.sparse_grid(experts))
            self._sparse[size] = _mesh(self.device_type, grid, ("edp", "ep", "etp"))
        return self._sparse[size]

    def staged(self, experts: int) -> DeviceMesh | None:
        """Return a layer's ep groups as ("rest", "node", "local"), or None if one stage is enough.

        "local" are the ranks of an ep group on one node, "node" those of equal place on all nodes.
        """
        size = self.layout.ep(experts)
        if size not in self._nodes:
            grid = torch.tensor(self.layout.sparse_grid(experts))  # [edp, ep, etp]
            groups = grid.movedim(1, 2).reshape(-1, size)
            local = local_ranks(groups[0].tolist(), self.node)
            whole = all(local_ranks(row, self.node) == local for row in groups.tolist())
            mesh = None
            if whole and 1 < local < size:
                staged = groups.view(-1, size // local, local)
                mesh = _mesh(self.device_type, staged, ("rest", "node", "local"))
            self._nodes[size] = mesh
        return self._nodes[size]

    def reducing(self, mesh: DeviceMesh, name: str) -> str:
        """Return the name of a separate group for gradients, along one dimension of a mesh."""
        # Separate, because gradients are sent while other collectives of the backward pass are in
        # flight, and a group is one queue.
        place = list(mesh.mesh_dim_names or ()).index(name)
        groups = mesh.mesh.movedim(place, -1).flatten(0, -2).tolist()
        key = tuple(sorted(tuple(group) for group in groups))
        flat = (len(groups), *(rank for group in key for rank in group))
        if flat not in self._reducing:
            own, _ = dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
                [list(group) for group in key]
            )
            compat.take_timeout_of_world([own])
            self._reducing[flat] = own.group_name
        return self._reducing[flat]


def _mesh(device_type: str, ranks: torch.Tensor, names: tuple[str, ...]) -> DeviceMesh:
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh(device_type, ranks, mesh_dim_names=names)
    compat.take_timeout_of_world(mesh.get_all_groups())
    return mesh


def _check_mesh(mesh: Any, layout: Layout) -> None:
    names = tuple(getattr(mesh, "mesh_dim_names", None) or ())
    expected = (layout.dp, layout.tensor)
    sizes = tuple(mesh.shape) if hasattr(mesh, "shape") else ()
    usual = f"init_device_mesh(device, {expected}, mesh_dim_names=('dp', 'tp'))"
    if names != ("dp", "tp") or sizes != expected:
        raise PlanError(
            f"mesh has dimensions {names} of sizes {sizes}; the plan needs ('dp', 'tp') of sizes "
            f"{expected}: {usual}",
            path="parallel",
        )
    # Torch's groups put their ranks in ascending order, whatever a mesh says.
    if mesh.mesh.tolist() != layout.dense_grid():
        raise PlanError(
            f"mesh holds the ranks {mesh.mesh.tolist()}; they must be in ascending order: {usual}",
            path="parallel",
        )
