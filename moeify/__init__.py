"""moeify: turn dense PyTorch models into Mixture-of-Experts models by graph passes.

```python
from moeify import moeify

model = moeify(model, "pr-moe")
```

Names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeify.version import __version__ as __version__

_HOMES = {
    "moeify": "moeify.api",
    "demoeify": "moeify.api",
    "export": "moeify.exporting",
    "find_mlps": "moeify.discovery",
    "optimizer": "moeify.optimizing",
    "param_groups": "moeify.optimizing",
    "clip_grad_norm_": "moeify.clipping",
    "save_sharded": "moeify.sharded_checkpoint",
    "load_sharded": "moeify.sharded_checkpoint",
    "latest": "moeify.sharded_checkpoint",
    "to_single": "moeify.sharded_convert",
    "to_sharded": "moeify.sharded_convert",
    "aux_loss": "moeify.losses",
    "router_stats": "moeify.losses",
    "RouterCallback": "moeify.callbacks",
    "report": "moeify.report_page",
    "RunLog": "moeify.run_log",
    "AlphaSchedule": "moeify.distill_schedule",
    "DistillationLoss": "moeify.distill_loss",
    "DistillationTrainer": "moeify.distill_trainer",
    "TeacherCache": "moeify.distill_cache",
    "distill": "moeify.distilling",
    "drop_layers": "moeify.students",
    "student": "moeify.students",
    "save": "moeify.checkpoint",
    "load": "moeify.api",
    "MoE": "moeify.layer",
    "Plan": "moeify.plan",
    "Site": "moeify.sites",
    "LayerPlan": "moeify.layer_plan",
    "ResolvedPlan": "moeify.layer_plan",
    "MoeifyError": "moeify.errors",
    "PlanError": "moeify.errors",
    "CaptureError": "moeify.errors",
    "UnsupportedModuleError": "moeify.errors",
    "PassError": "moeify.errors",
    "PassOrderError": "moeify.errors",
    "VerificationError": "moeify.errors",
    "CheckpointError": "moeify.errors",
    "DispatchError": "moeify.errors",
}

_BODIES = {"resolve_plan": "moeify.api"}
"""Bodies of methods that a module without torch has and that need torch; not of the face."""

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from moeify.api import demoeify as demoeify
    from moeify.api import load as load
    from moeify.api import moeify as moeify
    from moeify.api import resolve_plan as resolve_plan
    from moeify.callbacks import RouterCallback as RouterCallback
    from moeify.checkpoint import save as save
    from moeify.clipping import clip_grad_norm_ as clip_grad_norm_
    from moeify.discovery import find_mlps as find_mlps
    from moeify.distill_cache import TeacherCache as TeacherCache
    from moeify.distill_loss import DistillationLoss as DistillationLoss
    from moeify.distill_schedule import AlphaSchedule as AlphaSchedule
    from moeify.distill_trainer import DistillationTrainer as DistillationTrainer
    from moeify.distilling import distill as distill
    from moeify.errors import CaptureError as CaptureError
    from moeify.errors import CheckpointError as CheckpointError
    from moeify.errors import DispatchError as DispatchError
    from moeify.errors import MoeifyError as MoeifyError
    from moeify.errors import PassError as PassError
    from moeify.errors import PassOrderError as PassOrderError
    from moeify.errors import PlanError as PlanError
    from moeify.errors import UnsupportedModuleError as UnsupportedModuleError
    from moeify.errors import VerificationError as VerificationError
    from moeify.exporting import export as export
    from moeify.layer import MoE as MoE
    from moeify.layer_plan import LayerPlan as LayerPlan
    from moeify.layer_plan import ResolvedPlan as ResolvedPlan
    from moeify.losses import aux_loss as aux_loss
    from moeify.losses import router_stats as router_stats
    from moeify.optimizing import optimizer as optimizer
    from moeify.optimizing import param_groups as param_groups
    from moeify.plan import Plan as Plan
    from moeify.report_page import report as report
    from moeify.run_log import RunLog as RunLog
    from moeify.sharded_checkpoint import latest as latest
    from moeify.sharded_checkpoint import load_sharded as load_sharded
    from moeify.sharded_checkpoint import save_sharded as save_sharded
    from moeify.sharded_convert import to_sharded as to_sharded
    from moeify.sharded_convert import to_single as to_single
    from moeify.sites import Site as Site
    from moeify.students import drop_layers as drop_layers
    from moeify.students import student as student


def __getattr__(name: str) -> object:
    home = _HOMES.get(name) or _BODIES.get(name)
    if home is None:
        raise AttributeError(f"module 'moeify' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
