"""DeepSpeed's MoE layers as rules of a plan: what their arguments mean, and which layers they are.

Two vocabularies, one meaning: the constructor of `deepspeed.moe.layer.MoE`, and the launch
arguments of Megatron-DeepSpeed. Importable without torch.

Source:
    deepspeed/moe/layer.py and sharded_moe.py; megatron/arguments.py and model/transformer.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Final

from moeify.plan.deepspeed.config_reader import Section, Source, show
from moeify.plan.deepspeed.unsupported_keys import MOE
from moeify.plan.rules import LayerRule
from moeify.plan.selection import Select
from moeify.plan.strict_yaml import Where, path_text

_ALIASES: Final[Mapping[str, str]] = {
    "moe_experts": "num_experts",
    "moe_expert_parallel_size": "ep_size",
    "topk": "k",
    "moe_train_capacity_factor": "capacity_factor",
    "moe_eval_capacity_factor": "eval_capacity_factor",
    "moe_min_capacity": "min_capacity",
    "moe_token_dropping": "drop_tokens",
    "moe_top2_2nd_expert_sampling": "top2_2nd_expert_sampling",
    "model_parallel_size": "tensor_model_parallel_size",
    "moe_type": "mlp_type",
    "type": "mlp_type",
}
_OPPOSITES: Final[Mapping[str, str]] = {
    "disable_moe_token_dropping": "drop_tokens",
    "disable_moe_top2_2nd_expert_sampling": "top2_2nd_expert_sampling",
}
_MEGATRON: Final = frozenset(
    "moe_expert_parallel_size topk moe_train_capacity_factor moe_eval_capacity_factor mlp_type "
    "moe_min_capacity moe_token_dropping moe_top2_2nd_expert_sampling expert_interval "
    "create_moe_param_group num_layers tensor_model_parallel_size disable_moe_token_dropping "
    "disable_moe_top2_2nd_expert_sampling ds_inference".split()
)

Stated = Mapping[str, tuple[Any, Where]]
"""Values and places of arguments, by their names in `MoE`."""


@dataclass(frozen=True)
class Block:
    """What one MoE layer, or each of them, becomes; `residual` and `router` as in a plan."""

    experts: int | None  # None leaves it to the rules
    top_k: int
    residual: str
    router: dict[str, Any]
    ep: int = 1  # ranks that share the experts
    tensor: int | None = None  # ranks that share dense layers; None if not stated
    sliced: bool = False  # whether these also share each expert
    where: Where = ("moe",)  # place of `ep_size`, for messages


@dataclass(frozen=True)
class Blocks:
    """All MoE layers of a config."""

    each: tuple[Block, ...]  # a single one unless `listed`
    listed: bool  # one for each MoE layer of the model, in order
    interval: int  # every n-th layer is one
    where: Where


def states(source: Source, arguments: Mapping[str, Any], where: Where) -> Stated:
    """Rename arguments to those of `MoE`; dashes of a command line are accepted."""
    found: list[Stated] = []
    for key, value in arguments.items():
        if not isinstance(key, str):
            raise source.fault(where, f"the key {key!r} is not a string")
        word = _word(key)
        if value is None:
            continue
        if word not in _OPPOSITES:
            found.append({_ALIASES.get(word, word): (value, (*where, key))})
        elif not isinstance(value, bool):
            raise source.fault((*where, key), f"{show(value)} does not fit: expected true or false")
        elif value:  # a flag that is not set states nothing
            found.append({_OPPOSITES[word]: (False, (*where, key))})
    return merged(source, found)


def _word(key: str) -> str:
    return key.lstrip("-").replace("-", "_")


def merged(source: Source, parts: Sequence[Stated]) -> Stated:
    """Merge what several places state about the same layers; refuse contradictions."""
    found: dict[str, tuple[Any, Where]] = {}
    for part in parts:
        for key, (value, where) in part.items():
            other, place = found.setdefault(key, (value, where))
            if not _same(other, value):
                raise source.fault(
                    where, f"{show(value)} contradicts `{path_text(place)}`: {show(other)}"
                )
    return found


def _same(left: Any, right: Any) -> bool:
    as_list = [each if isinstance(each, list | tuple) else [each] for each in (left, right)]
    return list(as_list[0]) == list(as_list[1])


def read_blocks(source: Source, all_stated: Sequence[Stated], where: Where) -> Blocks:
    """Read the arguments of all MoE layers, once for all or once for each."""
    made: list[Block] = []
    intervals: set[int] = set()
    listed = len(all_stated) > 1
    for stated in all_stated:
        values = {key: value for key, (value, _) in stated.items()}
        if any(_word(str(place[-1])) in _MEGATRON for _, place in stated.values()):
            values.setdefault("moe_loss_coeff", 0.1)  # a launch script's default
        section = Section(source, values, where, {k: place for k, (_, place) in stated.items()})
        counts = _counts(section)
        listed = listed or len(counts) > 1
        if len(all_stated) > 1 and len(counts) > 1:
            raise section.fault("num_experts", "one number here: each mapping is one MoE layer")
        interval = _positive(section, "expert_interval", 2)
        intervals.add(interval)
        layers = section.take("num_layers", "count")
        if layers is not None and len(counts) > 1 and layers // interval != len(counts):
            raise section.fault(
                "num_experts",
                f"{len(counts)} counts for {layers // interval} MoE layers: {layers} layers, every "
                f"{interval}.",
            )
        block = _block(section, counts[0])
        made += [replace(block, experts=count) for count in counts]
        section.take("hidden_size")  # known from the model
        section.report(MOE)
    if len(intervals) > 1:
        raise source.fault(where, "layers differ in `expert_interval`")
    return Blocks(tuple(made), listed, intervals.pop(), where)


def _counts(section: Section) -> tuple[int | None, ...]:
    value = section.take("num_experts")
    if value is None:
        return (None,)
    counts = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not counts or any(type(count) is not int or count < 1 for count in counts):
        raise section.fault(
            "num_experts", f"{show(value)} does not fit: expected integers of at least 1"
        )
    return counts


def _positive(section: Section, key: str, default: int) -> int:
    value: int = section.take(key, "count", default)
    if value < 1:
        raise section.fault(key, f"{value} does not fit: expected at least 1")
    return value


def _factor(section: Section, key: str) -> float:
    value = float(section.take(key, "number", 1.0))
    if not 0 < value < float("inf"):
        raise section.fault(key, f"{value} does not fit: expected a number above 0")
    return value


def _block(section: Section, experts: int | None) -> Block:
    top_k = _positive(section, "k", 1)
    kind = section.choice("mlp_type", ("standard", "residual"))
    residual = section.take("use_residual", "flag")
    if kind is not None and residual is not None and residual != (kind == "residual"):
        raise section.fault("mlp_type", f"`{kind}` contradicts `use_residual`")
    drops = section.take("drop_tokens", "flag", True)
    factors = _factor(section, "capacity_factor"), _factor(section, "eval_capacity_factor")
    router: dict[str, Any] = {
        "score": section.choice("score_func", ("softmax", "sigmoid"), "softmax"),
        "combine": "probability" if top_k == 1 else "normalized",
        "noise": _noise(section, top_k),
        "capacity_factor": factors[0] if drops else None,
        "eval_capacity_factor": factors[1] if drops else None,
        "min_capacity": section.take("min_capacity", "count", 4),
        "drop": _drop(section, top_k),
        "balance": "first" if top_k == 2 else "all",
    }
    normalized = section.take("route_norm", "flag")
    if normalized is not None:
        router["combine"] = "normalized" if normalized else "probability"
    coefficient = section.take("moe_loss_coeff", "number")
    if coefficient is None:
        section.source.note(
            section.where,
            "MoE returns l_aux without a weight, and your loop weights it; here the weight is "
            "router.aux_loss: 0.01, unless these arguments have `moe_loss_coeff`",
        )
    router["aux_loss"] = 0.01 if coefficient is None else float(coefficient)
    if router["aux_loss"] < 0:
        raise section.fault("moe_loss_coeff", f"{coefficient} does not fit: expected at least 0")
    if router["min_capacity"] < 0:
        raise section.fault("min_capacity", "expected at least 0")
    tensor = section.take("tensor_model_parallel_size", "count")
    return Block(
        experts,
        top_k,
        "coefficient" if residual or kind == "residual" else "none",
        router,
        _positive(section, "ep_size", 1),
        tensor,
        section.take("enable_expert_tensor_parallelism", "flag", False),
        section.at("ep_size"),
    )


def _noise(section: Section, top_k: int) -> str:
    policy = section.choice("noisy_gate_policy", ("None", "Jitter", "RSample"), "None")
    samples = section.take("top2_2nd_expert_sampling", "flag", True) and top_k == 2
    if policy == "Jitter" and samples:
        section.note(
            "noisy_gate_policy",
            "with k=2 DeepSpeed also samples the second expert; a plan has one kind of noise: "
            "jitter, without sampling",
        )
    if policy == "RSample" and top_k != 1:
        section.note("noisy_gate_policy", "RSample does nothing for k above 1, as in DeepSpeed")
    if policy == "Jitter":
        return "jitter"
    if policy == "RSample" and top_k == 1:
        return "rsample"
    return "gumbel" if samples else "none"


def _drop(section: Section, top_k: int) -> str:
    random = section.take("use_rts", "flag", True)
    if top_k == 1:
        return "random" if random else "position"
    return "position" if top_k == 2 else "score"


def rules_of(source: Source, blocks: Blocks | None, layers: Any) -> list[dict[str, Any]]:
    """Return a plan's rules from MoE layers and the `layers` of `Plan.from_deepspeed`."""
    if isinstance(layers, Mapping) and "select" in layers:
        layers = [layers]
    if isinstance(layers, list | tuple):
        return _filled(source, blocks, [_rule(source, each) for each in layers])
    if blocks is None:
        raise source.fault(
            ("moe",),
            "the number of experts is missing: give moe={'num_experts': 8, ...}, the "
            "arguments of your MoE layers, or `layers`, rules with `experts`",
        )
    if layers is None:
        layers = {"every": blocks.interval, "start": blocks.interval - 1}
    if isinstance(layers, Select):
        layers = layers.model_dump(mode="json", exclude_unset=True)
    if not blocks.listed:
        return [_stated(layers, blocks.each[0])]
    return _listed(source, blocks, layers)


def _rule(source: Source, rule: Any) -> dict[str, Any]:
    if isinstance(rule, LayerRule):
        rule = rule.model_dump(mode="json", by_alias=True, exclude_unset=True)
    if not isinstance(rule, Mapping):
        raise source.fault(("layers",), f"{show(rule)} is not a rule: {{'select': ..., ...}}")
    return dict(rule)


def _stated(select: Any, block: Block) -> dict[str, Any]:
    count = {} if block.experts is None else {"experts": block.experts}
    rule = {"select": select, **count, "top_k": block.top_k, "residual": block.residual}
    return {**rule, "router": dict(block.router)}


def _filled(
    source: Source, blocks: Blocks | None, rules: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    if blocks is None:
        return rules
    each = blocks.each if blocks.listed else blocks.each * len(rules)
    if len(each) != len(rules):
        raise source.fault(
            ("layers",), f"{len(rules)} rules for {len(each)} MoE layers: give one for each"
        )
    made = []
    for rule, block in zip(rules, each, strict=True):
        if rule.get("experts") != "dense":
            stated = _stated(None, block)
            router = rule.get("router", {})
            rule = {**stated, **rule}
            if isinstance(router, Mapping):
                rule["router"] = {**block.router, **router}
        made.append(rule)
    return made


def _listed(source: Source, blocks: Blocks, select: Any) -> list[dict[str, Any]]:
    """Return a rule, with explicit positions, for each run of equal layers."""
    count = len(blocks.each)
    places = _positions(select, count)
    if places is None:
        raise source.fault(
            ("layers",),
            f"{count} MoE layers need positions: `every`, `first`, an ascending `index` or `all`; "
            "or a list of rules, one for each",
        )
    if len(places) != count:
        raise source.fault(("layers",), f"selects {len(places)} sites for {count} MoE layers")
    source.note(
        blocks.where,
        f"the {count} MoE layers are sites {places[0]} to {places[-1]}; a deeper model keeps "
        "its other MLPs dense",
    )
    rules = []
    pairs = list(zip(places, blocks.each, strict=True))
    for block, run in groupby(pairs, key=lambda pair: pair[1]):
        if block.experts != 1:  # Megatron: a layer with one expert is a dense one
            rules.append(_stated({"index": [place for place, _ in run]}, block))
    if not rules:
        raise source.fault(blocks.where, "no layer has more than one expert")
    return rules


def _positions(select: Any, count: int) -> list[int] | None:
    if select == "all":
        return list(range(count))
    chosen = Select.model_validate(select) if isinstance(select, Mapping) else None
    if chosen is None or chosen.of == "selected":
        return None
    if chosen.key == "every":
        return [chosen.start + chosen.every * place for place in range(count)]
    if chosen.key == "first":
        return list(range(chosen.first))
    if chosen.key == "index":
        index = [chosen.index] if isinstance(chosen.index, int) else list(chosen.index)
        return index if index == sorted(index) and index[0] >= 0 else None
    return None
