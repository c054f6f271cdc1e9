"""Check a plan's `zero:` against the rest of the plan, and against the process it runs in."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeify.plan.plan import Plan

log = logging.getLogger("moeify")


def check_spec(plan: Plan) -> None:
    """Raise a `PlanError` if a plan's `zero:` contradicts the rest of the plan."""
    zero, gradients = plan.zero, plan.parallel.gradients
    if zero.engine == "graph" and zero.stage < 2:
        raise plan.fault(("zero", "engine"), "`graph` partitions parameters: use stage 2 or 3")
    if zero.engine == "graph" and zero.offload != "none":
        raise plan.fault(("zero", "offload"), "goes with `engine: fsdp2`")
    if zero.offload in ("parameters", "all") and zero.stage < 3:
        raise plan.fault(
            ("zero", "offload"),
            f"`{zero.offload}` needs stage 3: below it, parameters stay whole and on the device; "
            "use `optimizer`",
        )
    if zero.stage >= 2 and gradients != "all":
        raise plan.fault(
            ("parallel", "gradients"), f"stage {zero.stage} reduces all gradients itself; use `all`"
        )


def check_process(plan: Plan, *, distributed: bool) -> None:
    """Raise a `PlanError` if a plan's `zero:` needs `torch.distributed`, which does not run."""
    zero = plan.zero
    if distributed:
        return
    if zero.offload != "none" or zero.precision != "model":
        key = "offload" if zero.offload != "none" else "precision"
        raise plan.fault(
            ("zero", key),
            "needs torch.distributed: start the process by torchrun --nproc-per-node 1, and call "
            "init_process_group first",
        )
    if zero.stage:
        log.info("one process: zero.stage %d has nothing to partition", zero.stage)
