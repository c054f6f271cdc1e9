"""`Plan.from_deepspeed`: what a DeepSpeed config and its MoE layers mean, as a plan.

A ds_config also has an optimizer, batch sizes and much else that a plan has no field for. None of
it is dropped silently: each such key is a note on the plan and a warning in the log, with the call
that does the same where there is one. Importable without torch.

Source:
    deepspeed/runtime/config.py, zero/config.py, zero/offload_config.py, precision_config.py,
    inference/config.py and module_inject/auto_ep_config.py of DeepSpeed 0.19.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from moeify.plan.deepspeed import unsupported_keys as notes
from moeify.plan.deepspeed.config_reader import Section, Source, read, show
from moeify.plan.deepspeed.moe_arguments import (
    Blocks,
    Stated,
    merged,
    read_blocks,
    rules_of,
    states,
)
from moeify.plan.strict_yaml import Where

log = logging.getLogger("moeify")

_DTYPES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("fp32", "float32", "float", "torch.float32"), "float32"),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("fp16", "float16", "half", "torch.float16"), "fp16"),
}
_ARGUMENTS: Final = "MoE"  # place of the `moe` argument, which is not in a file


def plan_data(config: Any, moe: Any, layers: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Translate the arguments of `Plan.from_deepspeed`.

    Returns:
        The plan's data, not yet validated, and a sentence for each key that is not in it.
    """
    data, source = read(config)
    top = Section(source, data)
    precision, master = _precision(top)
    zero = _zero(top)
    if precision != "model":
        zero |= {"precision": precision, "reduce": _reduce(top, precision)}
    if master is not None:
        if zero["stage"] == 0:
            raise source.fault(master, "needs `zero_optimization.stage` 1, 2 or 3")
        zero["master"] = "same"
    tensors = _tensors(top)
    blocks = _blocks(top, moe, has_rules=isinstance(layers, list | tuple))
    _build_yourself(top)
    top.report(notes.TOP)
    rules = rules_of(source, blocks, layers)
    made: dict[str, Any] = {"layers": rules, "zero": zero}
    counts = [rule["experts"] for rule in rules if type(rule.get("experts")) is int]
    made["parallel"] = _parallel(source, blocks, counts, tensors)
    if blocks is not None:
        # A router that all rules share is stated once.
        routers = [rule.get("router") for rule in rules if "router" in rule]
        if routers and all(router == routers[0] for router in routers):
            made["router"] = routers[0]
            for rule in rules:
                rule.pop("router", None)
    for note in source.notes:
        log.warning("from_deepspeed: %s", note)
    return made, tuple(source.notes)


def _precision(top: Section) -> tuple[str, Where | None]:
    """Return the plan's precision, and the place that asks for masters of that precision."""
    found: dict[str, Section] = {}
    for key, name in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16")):
        section = top.section(key)
        enabled = section.take("enabled", "flag", False)
        if not enabled:
            continue
        if found and name not in found:
            raise top.fault(key, "`bf16` and `fp16` are both enabled; disable one of them")
        found.setdefault(name, section)
    if not found:
        return "model", None
    name, section = next(iter(found.items()))
    key = f"{name}_master_weights_and_grads"
    master = section.at(key) if section.take(key, "flag", False) else None
    if name == "fp16" and not section.left.keys() & {"loss_scale", "initial_scale_power"}:
        top.note("fp16", "losses are not scaled here, as DeepSpeed does by 2**16 at the start")
    section.report(notes.PRECISION)
    return name, master


def _reduce(top: Section, precision: str) -> str:
    """Return the dtype of gradient reduction; DeepSpeed's default is the computation's."""
    types = top.section("data_types")
    stated: str | None = None
    for section, key in ((top, "communication_data_type"), (types, "grad_accum_dtype")):
        word = section.choice(key, _DTYPES)
        if word is None:
            continue
        dtype = _DTYPES[word]
        if dtype not in ("float32", precision):
            section.note(key, f"gradients are reduced in float32 or {precision}, not in {word}")
        elif stated is None:
            stated = dtype
        elif stated != dtype:
            section.note(key, "gradients are accumulated in the dtype in which they are reduced")
    for key in ("param_dtype", "buffer_dtype"):
        word = types.choice(key, _DTYPES)
        if word is not None and (key == "buffer_dtype" or _DTYPES[word] != precision):
            types.note(key, "parameters have the precision of `fp16`/`bf16`, buffers their own")
    types.report({})
    return "float32" if stated == "float32" else "same"


def _zero(top: Section) -> dict[str, Any]:
    value = top.left.get("zero_optimization")
    if isinstance(value, bool):  # the oldest form
        top.take("zero_optimization")
        return {"stage": int(value)}
    section = top.section("zero_optimization")
    section.left = _without_prefix(section)
    stage = section.take("stage", "count", 0)
    if not 0 <= stage <= 3:
        raise section.fault("stage", f"{stage} does not fit: expected 0, 1, 2 or 3")
    zero: dict[str, Any] = {"stage": stage}
    optimizer = _offloads(section, "offload_optimizer", ("cpu_offload",), stage)
    parameters = _offloads(
        section, "offload_param", ("cpu_offload_param", "cpu_offload_params"), stage
    )
    if parameters and stage != 3:
        raise section.source.fault(parameters, f"needs stage 3; here it is {stage}")
    if optimizer and stage == 0:
        section.source.note(optimizer, "without a stage nothing is offloaded, as in DeepSpeed")
        optimizer = None
    if optimizer or parameters:
        both = "all" if optimizer else "parameters"
        zero["offload"] = both if parameters else "optimizer"
    if section.left.get("prefetch_bucket_size") == 0:
        section.take("prefetch_bucket_size")
        zero["prefetch"] = 0
    section.report(notes.ZERO)
    return zero


def _without_prefix(section: Section) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for key, value in section.left.items():
        short = key.removeprefix("stage3_")
        if short in named:
            raise section.fault(key, f"`{short}` is set twice, with and without `stage3_`")
        named[short if short in notes.ZERO else key] = value
    return named


def _offloads(section: Section, key: str, old: Sequence[str], stage: int) -> Where | None:
    """Return the place that asks for offloading, or None."""
    asked: Where | None = None
    for name in old:
        if section.take(name, "flag", False):
            asked = section.at(name)
    stated = key in section.left
    part = section.section(key)
    device = part.choice("device", ("none", "cpu", "nvme"), "none")
    if asked and stated and device == "none":
        raise section.fault(key, f"contradicts `{asked[-1]}: true`")
    if device == "nvme":
        part.note("device", "nvme: offloaded to CPU memory, never to disk; it must fit there")
    if part.left.get("ratio", 1) != 1 and stage != 3:
        raise part.fault("ratio", f"goes with stage 3; here it is {stage}")
    if device == "none":
        part.left.clear()
    part.report(notes.OFFLOAD)
    return section.at(key) if device != "none" else asked


def _tensors(top: Section) -> list[tuple[int, Where]]:
    """Return each tensor-parallel size that the config states, with its place."""
    found: list[tuple[int, Where]] = []
    section = top.section("tensor_parallel")
    if section.take("enabled", "flag", True):
        inner = section.section("tensor_parallel" if "tensor_parallel" in section.left else "tp")
        for part, key in ((section, "autotp_size"), (section, "tp_size"), (inner, "tp_size")):
            size = part.take(key, "count", 0)
            if size < 0:
                raise part.fault(key, f"{size} does not fit: expected at least 1")
            if size:
                found.append((size, part.at(key)))
        inner.report(notes.TENSOR)
        section.report(notes.TENSOR)
    size = top.take("mp_size", "count")
    return found if size is None else [*found, (size, top.at("mp_size"))]


def _blocks(top: Section, moe: Any, *, has_rules: bool) -> Blocks | None:
    """Read the MoE layers from the `moe` argument and from the config."""
    source = top.source
    shared: list[Stated] = []
    section = top.left.get("moe")
    if isinstance(section, bool):
        top.take("moe")
        section = None
    config = top.section("moe") if section is not None else None
    if config is not None and config.take("enabled", "flag", True):
        shared.append(states(source, config.left, config.where))
    # The oldest form of the inference config has them at the top.
    names = ("ep_size", "moe_experts", "moe_type")
    old: dict[str, Any] = {key: top.take(key) for key in names if key in top.left}
    if old:
        shared.append(states(source, old, ()))
    auto = _auto_ep(top)
    if auto is not None:
        shared.append(auto)
    where: Where = (_ARGUMENTS,)
    given: list[Any] = list(moe) if isinstance(moe, list | tuple) else [moe]
    if not given:
        raise source.fault(where, "an empty list; give the arguments of your MoE layers")
    if moe is None:
        given = [{}] if shared else []
    each = []
    for position, arguments in enumerate(given):
        at: Where = (*where, position) if isinstance(moe, list | tuple) else where
        if not isinstance(arguments, Mapping):
            raise source.fault(at, f"{show(arguments)} does not fit: expected a mapping")
        each.append(merged(source, [states(source, arguments, at), *shared]))
    place = ("moe",) if moe is None else where
    if not each:
        return None
    if not has_rules and not all("num_experts" in stated for stated in each):
        raise source.fault(
            place, "`num_experts` is missing; give it in `moe`, or rules with `experts` as `layers`"
        )
    return read_blocks(source, each, place)


def _auto_ep(top: Section) -> Stated | None:
    """Return `expert_parallel` as arguments of `MoE`; None if it is not enabled."""
    section = top.section("expert_parallel")
    if not section.take("enabled", "flag", False):
        return None
    if section.take("expert_tensor_parallel_size", "count", 1) != 1:
        raise section.fault("expert_tensor_parallel_size", "DeepSpeed takes 1 only")
    if section.take("load_balance_coeff") is not None:
        raise section.fault("load_balance_coeff", "DeepSpeed takes null only")
    found: dict[str, tuple[Any, Where]] = {}
    words = {"autoep_size": "ep_size", "top_k": "k", "score_func": "score_func"}
    for key, name in {**words, "route_norm": "route_norm"}.items():
        value = section.take(key)
        if value is not None:
            found[name] = (value, section.at(key))
    section.report(notes.AUTOEP)
    return found


def _parallel(
    source: Source,
    blocks: Blocks | None,
    counts: Sequence[int],
    tensors: list[tuple[int, Where]],
) -> dict[str, Any]:
    each = blocks.each if blocks is not None else ()
    where = blocks.where if blocks is not None else ()
    tensors = tensors + [(block.tensor, where) for block in each if block.tensor is not None]
    tensor = tensors[0][0] if tensors else 1
    for size, place in tensors:
        if size < 1:
            raise source.fault(place, f"{size} does not fit: expected at least 1")
        if size != tensor:
            raise source.fault(place, f"tensor parallelism over {size} ranks contradicts {tensor}")
    expert = max((block.ep for block in each), default=1)
    widest = next((block.where for block in each if block.ep == expert), where)
    for many in counts:
        if many % expert and expert % many:
            fits = ", ".join(str(size) for size in range(1, many + 1) if many % size == 0)
            raise source.fault(
                widest, f"{expert} ranks do not divide {many} experts: use one of {fits}"
            )
    for block in each:
        ranks = min(expert, block.experts or expert)
        if block.ep != ranks:
            source.note(
                block.where,
                f"the {block.experts or 'same'} experts of a layer are spread over {ranks} ranks, "
                f"not {block.ep}; changes no number",
            )
    sliced = any(block.sliced for block in each)
    inside = "replicate"
    if tensor > 1 and sliced:
        inside = "slice"
    elif tensor > 1 and expert % tensor == 0:
        inside = "fold"  # DeepSpeed's expert groups are then of consecutive ranks
    elif tensor > 1 and expert > 1:
        source.note(
            where,
            f"each rank of a tensor group has its own expert group: {expert} ranks are not a "
            f"multiple of {tensor}; changes no number",
        )
    return {"expert": expert, "tensor": tensor, "experts_in_tp": inside}


def _build_yourself(top: Section) -> None:
    advices = {"optimizer": notes.optimizer_advice, "scheduler": notes.scheduler_advice}
    for key, advice in advices.items():
        section = top.take(key, "mapping")
        if section:
            top.note(key, advice(section))
