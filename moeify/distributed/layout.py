"""One world of ranks in two views: a dense one (dp, tp) and a sparse one (edp, ep, etp).

Arithmetic only, without torch, so that a layout can be checked, printed and simulated anywhere.
Rank `r` of the dense view is `(r // tp, r % tp)`: tp ranks are neighbours, then come the ranks
that share a layer's experts, so that both are on one node where they fit.

Source:
    The two views: DeepSpeed-MoE (Rajbhandari et al. 2022) section 5, "flexible multi-expert,
    multi-data parallelism"; torchtitan's dense and sparse meshes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeify.errors import PlanError

if TYPE_CHECKING:
    from moeify.plan.specs import ParallelSpec

__all__ = ["Layout"]

Grid = list[list[list[int]]]
"""Ranks by [edp][ep][etp]."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One world, cut into groups."""

    world: int
    tensor: int = 1  # tp: ranks that share each dense layer
    expert: int = 1  # ep: ranks that share a layer's experts, if it has at least as many
    experts_in_tp: str = "replicate"  # what tensor ranks do with experts, or "slice", "fold"

    @classmethod
    def of(cls, spec: ParallelSpec, world: int) -> Layout:
        """Apply a plan's `parallel:` to a world of that many ranks.

        Raises:
            PlanError: They do not fit; the message lists sizes that work.
        """
        need = spec.expert if spec.experts_in_tp == "fold" else spec.expert * spec.tensor
        path = "parallel.expert" if spec.expert > 1 else "parallel.tensor"
        if spec.experts_in_tp == "fold" and spec.expert > 1 and spec.expert % spec.tensor:
            raise PlanError(
                f"experts_in_tp: fold spreads experts over whole tensor groups: expert "
                f"{spec.expert} must be a multiple of tensor {spec.tensor}",
                path="parallel.expert",
            )
        if spec.experts_in_tp == "fold":
            need = max(need, spec.tensor)
        if world % need:
            sizes = ", ".join(str(need * n) for n in (1, 2, 3, 4))
            if world == 1:
                hint = f"start {need} processes (torchrun --nproc-per-node {need} ...)"
            else:
                hint = f"worlds of {sizes}, ... work; {_that_fit(spec, world)}"
            raise PlanError(
                f"expert {spec.expert} and tensor {spec.tensor} ({spec.experts_in_tp}) do not fit "
                f"a world of {world}: {hint}",
                path=path,
            )
        return cls(world, spec.tensor, spec.expert, spec.experts_in_tp)

    @property
    def dp(self) -> int:
        """Ranks that see different tokens."""
        return self.world // self.tensor

    @property
    def etp(self) -> int:
        """Ranks that share each expert's hidden width."""
        return self.tensor if self.experts_in_tp == "slice" else 1

    def ep(self, experts: int) -> int:
        """Return over how many ranks a layer's experts are spread: at most one per expert."""
        return min(self.expert, experts)

    def edp(self, experts: int) -> int:
        """Return how many ranks hold the same expert of a layer."""
        return self.world // (self.ep(experts) * self.etp)

    def copies(self, *, coordinated: bool) -> int:
        """Return how often each token reaches each of its experts, over all replicas.

        The ranks of a tensor group hold the same tokens. Unless they share them out
        (`coordinated`), each sends all of them, and expert gradients count them that often.
        """
        return 1 if coordinated or self.etp > 1 else self.tensor

    def dense_grid(self) -> list[list[int]]:
        """Return the ranks of the dense view by [dp][tp]."""
        return [list(range(i * self.tensor, (i + 1) * self.tensor)) for i in range(self.dp)]

    def sparse_grid(self, experts: int) -> Grid:
        """Return the ranks of a layer's sparse view by [edp][ep][etp].

        `replicate`: an ep group has one rank of each of its tensor groups, all of equal tp rank;
        `slice`: the tensor group is the innermost dimension; `fold`: it is part of the ep group.
        A layer with fewer experts than ep ranks splits each of these groups.
        """
        ep, tp = self.ep(experts), self.tensor
        if self.experts_in_tp == "fold":
            return [[[first + i] for i in range(ep)] for first in range(0, self.world, max(ep, 1))]
        blocks = range(0, self.dp, ep)
        if self.experts_in_tp == "slice":
            return [
                [[(first + i) * tp + t for t in range(tp)] for i in range(ep)] for first in blocks
            ]
        return [[[(first + i) * tp + t] for i in range(ep)] for first in blocks for t in range(tp)]


def _that_fit(spec: ParallelSpec, world: int) -> str:
    """Name the expert sizes that fit this world at this tensor size."""
    if world % spec.tensor:
        sizes = [n for n in range(1, world + 1) if world % n == 0]
        return f"tensor must divide {world}: {', '.join(map(str, sizes))}"
    room = world if spec.experts_in_tp == "fold" else world // spec.tensor
    step = spec.tensor if spec.experts_in_tp == "fold" else 1
    sizes = [n for n in range(1, room + 1) if room % n == 0 and (n == 1 or n % step == 0)]
    return f"with tensor {spec.tensor}, expert may be {', '.join(map(str, sizes))}"
