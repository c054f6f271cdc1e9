"""Plans by name: the layouts of the papers, with the options that are usually changed.

Positions count over the model's installable sites, so a preset fits a model of any depth.
Importable without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from moeify.errors import PlanError
from moeify.plan.errors import unknown

PlanData: TypeAlias = dict[str, Any]

_SELECTORS: Final = ("every", "start", "half")
_ROUTER: Final = ("aux_loss", "capacity_factor", "combine", "noise")


@dataclass(frozen=True, slots=True)
class Preset:
    """A plan with options."""

    options: Mapping[str, Any]  # what the user may set, with the defaults
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def data(self, options: Mapping[str, Any]) -> PlanData:
        """Return the plan's data, as a plan file would hold it, not yet validated."""
        values = {**self.options, **self.fixed, **options}
        select = {key: values.pop(key) for key in _SELECTORS if key in values}
        router = {key: values.pop(key) for key in _ROUTER if key in values}
        layers = [{"select": select or "all", **values}]
        if "last" in layers[0]:
            # Counted over all sites, the second-last MLP of the model would become an MoE as well.
            last_two = {"last": 2, "of": "selected"}
            layers.append({"select": last_two, "experts": layers[0].pop("last")})
        return {"version": 1, "layers": layers, "router": router}


_LOSS: Final = {"aux_loss": 0.01}
_CAPACITY: Final = {**_LOSS, "capacity_factor": 1.25}
_ALTERNATE: Final = {"experts": 8, "every": 2, "start": 1, **_CAPACITY}
_HALF: Final = {"experts": 8, "top_k": 1, "residual": "none", **_CAPACITY}

PRESETS: Final[Mapping[str, Preset]] = MappingProxyType(
    {
        # Standard MoE: every second MLP, from the second on.
        # Source: GShard, Switch, DeepSpeed-MoE.
        "moe": Preset({"experts": 8, "top_k": 1, "residual": "none", **_ALTERNATE}),
        # Pyramid-Residual-MoE: `last` experts in the last two MoE layers.
        # Source: DeepSpeed-MoE, 4.1.
        "pr-moe": Preset(
            {**_ALTERNATE, "experts": 32, "last": 64, "top_k": 1}, {"residual": "coefficient"}
        ),
        # Residual-MoE: each expert corrects a dense MLP that stays. Source: DeepSpeed-MoE, 4.1.
        "residual": Preset(_ALTERNATE, {"top_k": 1, "residual": "coefficient"}),
        # Two experts per token. Source: GShard.
        "top2": Preset({**_ALTERNATE, "residual": "none"}, {"top_k": 2}),
        # Every MLP of one half. Source: the placement study of DeepSpeed-MoE, 4.1.
        "first-half": Preset(_HALF, {"half": "first"}),
        "second-half": Preset(_HALF, {"half": "second"}),
        # Switch Transformer: one expert, scaled by its probability, jittered. Scaling changes what
        # the model computes, so it does not start equal to the dense model. Source: Switch, 2.1.
        "switch": Preset(
            _ALTERNATE,
            {"top_k": 1, "residual": "none", "combine": "probability", "noise": "jitter"},
        ),
        # Every MLP, two of eight experts, nothing dropped. Source: Mixtral of Experts.
        "mixtral": Preset(
            {"experts": 8, "top_k": 2, **_LOSS}, {"combine": "normalized", "capacity_factor": None}
        ),
    }
)


def preset_data(name: str, options: Mapping[str, Any]) -> PlanData:
    """Return a preset's data.

    Raises:
        PlanError: The name or an option is unknown; the message lists those that exist.
    """
    if name not in PRESETS:
        raise PlanError(unknown(name, tuple(PRESETS), "preset"))
    preset = PRESETS[name]
    for option in options:
        if option not in preset.options:
            allowed = tuple(preset.options)
            raise PlanError(unknown(option, allowed, "option"), path=f"preset {name}")
    return preset.data(options)
