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
    "export": "moeify.graph_export.graph",
    "find_mlps": "moeify.sites.discovery",
    "optimizer": "moeify.train.optimizer",
    "param_groups": "moeify.train.optimizer",
    "clip_grad_norm_": "moeify.train.clip_grad",
    "save_sharded": "moeify.checkpoint.sharded.api",
    "load_sharded": "moeify.checkpoint.sharded.api",
    "latest": "moeify.checkpoint.sharded.api",
    "to_single": "moeify.checkpoint.sharded.convert",
    "to_sharded": "moeify.checkpoint.sharded.convert",
    "aux_loss": "moeify.train.losses",
    "router_stats": "moeify.train.losses",
    "update_router_biases": "moeify.train.losses",
    "RouterCallback": "moeify.train.trainer_callback",
    "report": "moeify.reporting.page",
    "RunLog": "moeify.train.run_log",
    "AlphaSchedule": "moeify.distillation.schedule",
    "DistillationLoss": "moeify.distillation.loss",
    "DistillationTrainer": "moeify.distillation.trainer",
    "TeacherCache": "moeify.distillation.teacher_cache",
    "distill": "moeify.distillation.distiller",
    "drop_layers": "moeify.distillation.student",
    "student": "moeify.distillation.student",
    "save": "moeify.checkpoint.single",
    "load": "moeify.api",
    "MoE": "moeify.nn.moe",
    "Plan": "moeify.plan.plan",
    "Site": "moeify.plan.site",
    "LayerPlan": "moeify.plan.layer_plan",
    "ResolvedPlan": "moeify.plan.layer_plan",
    "MoeifyError": "moeify.errors",
    "PlanError": "moeify.errors",
    "CaptureError": "moeify.errors",
    "UnsupportedModuleError": "moeify.errors",
    "PassError": "moeify.errors",
    "PassOrderError": "moeify.errors",
    "VerificationError": "moeify.errors",
    "CheckpointError": "moeify.errors",
    "DerivativeError": "moeify.errors",
    "DispatchError": "moeify.errors",
    "ForwardError": "moeify.errors",
}

_BODIES = {"resolve_plan": "moeify.api"}
"""Bodies of methods that a module without torch has and that need torch; not of the face."""

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from moeify.api import demoeify as demoeify
    from moeify.api import load as load
    from moeify.api import moeify as moeify
    from moeify.api import resolve_plan as resolve_plan
    from moeify.checkpoint.sharded.api import latest as latest
    from moeify.checkpoint.sharded.api import load_sharded as load_sharded
    from moeify.checkpoint.sharded.api import save_sharded as save_sharded
    from moeify.checkpoint.sharded.convert import to_sharded as to_sharded
    from moeify.checkpoint.sharded.convert import to_single as to_single
    from moeify.checkpoint.single import save as save
    from moeify.distillation.distiller import distill as distill
    from moeify.distillation.loss import DistillationLoss as DistillationLoss
    from moeify.distillation.schedule import AlphaSchedule as AlphaSchedule
    from moeify.distillation.student import drop_layers as drop_layers
    from moeify.distillation.student import student as student
    from moeify.distillation.teacher_cache import TeacherCache as TeacherCache
    from moeify.distillation.trainer import DistillationTrainer as DistillationTrainer
    from moeify.errors import CaptureError as CaptureError
    from moeify.errors import CheckpointError as CheckpointError
    from moeify.errors import DerivativeError as DerivativeError
    from moeify.errors import DispatchError as DispatchError
    from moeify.errors import ForwardError as ForwardError
    from moeify.errors import MoeifyError as MoeifyError
    from moeify.errors import PassError as PassError
    from moeify.errors import PassOrderError as PassOrderError
    from moeify.errors import PlanError as PlanError
    from moeify.errors import UnsupportedModuleError as UnsupportedModuleError
    from moeify.errors import VerificationError as VerificationError
    from moeify.graph_export.graph import export as export
    from moeify.nn.moe import MoE as MoE
    from moeify.plan.layer_plan import LayerPlan as LayerPlan
    from moeify.plan.layer_plan import ResolvedPlan as ResolvedPlan
    from moeify.plan.plan import Plan as Plan
    from moeify.plan.site import Site as Site
    from moeify.reporting.page import report as report
    from moeify.sites.discovery import find_mlps as find_mlps
    from moeify.train.clip_grad import clip_grad_norm_ as clip_grad_norm_
    from moeify.train.losses import aux_loss as aux_loss
    from moeify.train.losses import router_stats as router_stats
    from moeify.train.losses import update_router_biases as update_router_biases
    from moeify.train.optimizer import optimizer as optimizer
    from moeify.train.optimizer import param_groups as param_groups
    from moeify.train.run_log import RunLog as RunLog
    from moeify.train.trainer_callback import RouterCallback as RouterCallback


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
