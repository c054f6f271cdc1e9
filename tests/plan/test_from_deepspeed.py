"""A DeepSpeed config as a plan: every mapped key, a note for every other, errors with places."""

from __future__ import annotations

import base64
import json
import logging
import subprocess
import sys
from typing import Any

import pytest
import torch

from moeify.errors import PlanError
from moeify.plan.deepspeed.unsupported_keys import (
    AUTOEP,
    MOE,
    OFFLOAD,
    PRECISION,
    TENSOR,
    TOP,
    ZERO,
)
from moeify.plan.plan import Plan
from moeify.plan.rules import LayerRule
from moeify.plan.selection import Select
from tests.plan.test_resolve import make_sites, resolve

MOE_8 = {"num_experts": 8, "moe_loss_coeff": 0.01}
FP16 = {
    "enabled": True,
    "loss_scale": 0,
    "loss_scale_window": 500,
    "hysteresis": 2,
    "min_loss_scale": 1,
    "initial_scale_power": 11,
}
# ds_config_gpt_TEMPLATE.json of Megatron-DeepSpeed, filled in as its PR-MoE script does.
TEMPLATE = {
    "train_batch_size": 256,
    "train_micro_batch_size_per_gpu": 4,
    "steps_per_print": 10,
    "zero_optimization": {"stage": 0},
    "gradient_clipping": 1.0,
    "prescale_gradients": True,
    "fp16": FP16,
    "bf16": {"enabled": False},
    "curriculum_learning": {"enabled": False, "curriculum_type": "seqlen"},
    "wall_clock_breakdown": False,
}
# ds_pretrain_gpt_350M_PR-MoE32or64.sh
PR_MOE = {
    "tensor_model_parallel_size": 1,
    "moe_expert_parallel_size": 64,
    "num_experts": [32] * 10 + [64] * 2,
    "moe_loss_coeff": 0.01,
    "mlp_type": "residual",
    "moe_train_capacity_factor": 1.0,
    "moe_eval_capacity_factor": 1.0,
    "moe_min_capacity": 4,
    "num_layers": 24,
    "hidden_size": 1024,
    "create_moe_param_group": True,
}
# ds_pretrain_gpt_350M_PR-MoE32or64_MoS.sh: a student of 21 layers.
MOS = {
    **PR_MOE,
    "num_experts": [32] * 8 + [64] * 2,
    "num_layers": 21,
    "mos": True,
    "kd_beta_ce": 1,
    "num_experts_teacher": [32] * 10 + [64] * 2,
}


def read(config: Any = None, moe: Any = MOE_8, **options: Any) -> Plan:
    return Plan.from_deepspeed({} if config is None else config, moe=moe, **options)


def noted(plan: Plan, key: str) -> str:
    found = [note for note in plan.notes if note.startswith(f"{key}: ")]
    assert len(found) == 1, (key, plan.notes)
    return found[0].removeprefix(f"{key}: ")


def test_pr_moe_of_the_tutorial() -> None:
    plan = read(TEMPLATE, PR_MOE)
    assert plan.zero.stage == 0
    assert (plan.zero.precision, plan.zero.master, plan.zero.reduce) == ("fp16", "float32", "same")
    assert plan.parallel.expert == 64
    router = plan.router
    assert (router.combine, router.drop, router.balance) == ("probability", "random", "all")
    assert (router.capacity_factor, router.eval_capacity_factor) == (1.0, 1.0)
    assert (router.min_capacity, router.aux_loss, router.noise) == (4, 0.01, "none")
    resolved = resolve(plan, make_sites(24))
    assert [layer.site.index for layer in resolved] == list(range(1, 24, 2))
    assert [layer.experts for layer in resolved] == PR_MOE["num_experts"]
    assert {(layer.residual, layer.top_k) for layer in resolved} == {("coefficient", 1)}
    # The same sites as the preset's.
    preset = resolve(Plan.preset("pr-moe", experts=32, last=64), make_sites(24))
    assert [(a.site.index, a.experts) for a in resolved] == [
        (b.site.index, b.experts) for b in preset
    ]
    # DeepSpeed refuses 32 experts on 64 ranks; a plan gives such layers smaller groups.
    assert "over 32 ranks, not 64" in noted(plan, "MoE.moe_expert_parallel_size")
    assert noted(plan, "gradient_clipping") == (
        "clip before the step: mf.clip_grad_norm_(model, 1.0)"
    )
    assert "256 samples" in noted(plan, "train_batch_size")
    assert "param_groups" in noted(plan, "MoE.create_moe_param_group")
    keys = {note.split(":")[0] for note in plan.notes}
    assert not keys & {"wall_clock_breakdown", "curriculum_learning", "bf16", "MoE.hidden_size"}
    with pytest.raises(PlanError, match="there is no site 11"):
        resolve(plan, make_sites(10))  # too shallow for its positions


def test_mos_of_the_tutorial() -> None:
    plan = read(TEMPLATE, MOS)
    resolved = resolve(plan, make_sites(21))
    assert [layer.experts for layer in resolved] == MOS["num_experts"]
    assert "mf.student" in noted(plan, "MoE.mos")
    assert "mf.distill" in noted(plan, "MoE.num_experts_teacher")
    with pytest.raises(PlanError, match=r"MoE\.num_experts: 10 counts for 12 MoE layers"):
        read(TEMPLATE, {**MOS, "num_layers": 24})


def test_a_plan_from_a_config_resolves_on_a_model_on_meta() -> None:
    with torch.device("meta"):
        layer = torch.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
        model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    inputs = torch.empty(2, 8, 64, device="meta")
    plan = read({"zero_optimization": {"stage": 3}}, {"num_experts": [4, 8], "k": 2, "ep_size": 2})
    resolved = plan.resolve(model, inputs)
    assert [(each.site.index, each.experts, each.top_k) for each in resolved] == [
        (1, 4, 2),
        (3, 8, 2),
    ]
    assert plan.resolve(model, inputs)[0].router.combine == "normalized"


def test_arguments_of_the_layer() -> None:
    def router(**arguments: Any) -> Any:
        return read(moe={**MOE_8, **arguments}).router

    one, two, four = router(), router(k=2), router(k=4)
    assert (one.combine, one.drop, one.balance, one.noise) == (
        "probability",
        "random",
        "all",
        "none",
    )
    assert (two.combine, two.drop, two.balance, two.noise) == (
        "normalized",
        "position",
        "first",
        "gumbel",
    )
    assert (four.combine, four.drop, four.balance, four.noise) == (
        "normalized",
        "score",
        "all",
        "none",
    )
    assert router(use_rts=False).drop == "position"
    assert router(k=2, top2_2nd_expert_sampling=False).noise == "none"
    assert router(noisy_gate_policy="RSample").noise == "rsample"
    assert router(noisy_gate_policy="Jitter").noise == "jitter"
    assert router(noisy_gate_policy="None").noise == "none"
    dropless = router(drop_tokens=False, capacity_factor=2.0)
    assert (dropless.capacity_factor, dropless.eval_capacity_factor) == (None, None)
    some = router(capacity_factor=1.5, eval_capacity_factor=2, min_capacity=0)
    assert (some.capacity_factor, some.eval_capacity_factor, some.min_capacity) == (1.5, 2.0, 0)
    plan = read(moe={**MOE_8, "use_residual": True, "k": 2, "ep_size": 4})
    rule = plan.layers[0]
    assert (rule.experts, rule.top_k, rule.residual) == (8, 2, "coefficient")
    assert rule.select == Select.model_validate({"every": 2, "start": 1})
    assert plan.parallel.expert == 4


def test_what_layers_cannot_have_is_noted() -> None:
    both = read(moe={**MOE_8, "k": 2, "noisy_gate_policy": "Jitter"})
    assert both.router.noise == "jitter"
    assert "without sampling" in noted(both, "MoE.noisy_gate_policy")
    nothing = read(moe={**MOE_8, "k": 2, "noisy_gate_policy": "RSample"})
    assert nothing.router.noise == "gumbel"
    assert "does nothing" in noted(nothing, "MoE.noisy_gate_policy")
    plan = read(moe={"num_experts": 8, "expert": torch.nn.Linear(2, 2), "use_tutel": True})
    assert "copies of each site's own MLP" in noted(plan, "MoE.expert")
    assert "kernels" in noted(plan, "MoE.use_tutel")
    assert "router.aux_loss: 0.01" in noted(plan, "MoE")
    assert read(moe={**MOE_8, "use_tutel": False, "hidden_size": 8}).notes == ()
    assert "did you mean `capacity_factor`" in noted(
        read(moe={**MOE_8, "capacity_facter": 2.0}), "MoE.capacity_facter"
    )


def test_launch_arguments() -> None:
    plan = read(
        moe={
            "--num-experts": [16],
            "--topk": 2,
            "--expert-interval": 3,
            "--moe-expert-parallel-size": 4,
            "--disable-moe-token-dropping": True,
            "--disable-moe-top2-2nd-expert-sampling": True,
            "--mlp-type": "standard",
            "--tensor-model-parallel-size": 2,
            "--enable-expert-tensor-parallelism": True,
            "--ds-inference": False,
        }
    )
    (rule,) = plan.layers
    assert rule.select == Select.model_validate({"every": 3, "start": 2})
    assert (rule.experts, rule.top_k, rule.residual) == (16, 2, "none")
    assert (plan.router.capacity_factor, plan.router.noise) == (None, "none")
    assert plan.router.aux_loss == 0.1  # Megatron's default
    assert (plan.parallel.tensor, plan.parallel.expert) == (2, 4)
    assert plan.parallel.experts_in_tp == "slice"
    assert plan.notes == ()
    kept = read(moe={**MOE_8, "moe_token_dropping": True, "disable_moe_token_dropping": False})
    assert kept.router.capacity_factor == 1.0


def test_positions_of_layers() -> None:
    for select, given in (
        ("all", "all"),
        ({"half": "second"}, {"half": "second"}),
        ({"first": 2}, Select(first=2)),
    ):
        assert read(layers=given).layers[0] == read(layers=[{"select": select}]).layers[0]
    pyramid = {**MOE_8, "num_experts": [2, 4, 4, 1, 8]}
    everywhere = resolve(read(moe=pyramid, layers="all"), make_sites(5))
    assert [(each.site.index, each.experts) for each in everywhere] == [
        (0, 2),
        (1, 4),
        (2, 4),
        (4, 8),
    ]
    chosen = resolve(read(moe=pyramid, layers={"index": [1, 2, 4, 5, 7]}), make_sites(8))
    assert [each.site.index for each in chosen] == [1, 2, 4, 7]
    # Layers that differ in more than the count, one mapping for each.
    two = [{**MOE_8, "k": 1}, {**MOE_8, "num_experts": 4, "k": 2}]
    mixed = read(moe=two)
    assert [rule.top_k for rule in mixed.layers] == [1, 2]
    assert [rule.router.drop for rule in mixed.layers] == ["random", "position"]
    # Rules take what they do not state.
    rules = [
        {"select": {"first": 2}, "router": {"z_loss": 0.1}},
        LayerRule.model_validate({"select": {"last": 1}, "experts": 16}),
        {"select": {"index": 0}, "experts": "dense"},
    ]
    filled = read(moe={**MOE_8, "use_residual": True}, layers=rules)
    assert [rule.experts for rule in filled.layers] == [8, 16, "dense"]
    assert [rule.residual for rule in filled.layers[:2]] == ["coefficient"] * 2
    assert filled.layers[0].router.z_loss == 0.1
    alone = Plan.from_deepspeed({"bf16": {"enabled": True}}, layers=[{"select": "all", **EXPERTS}])
    assert (alone.layers[0].experts, alone.zero.precision) == (4, "bf16")
    without = read(moe={"ep_size": 4}, layers=[{"select": "all", **EXPERTS}])
    assert (without.layers[0].experts, without.parallel.expert) == (4, 4)
    for layers, text in (
        ({"half": "first"}, "need positions"),
        ({"first": 3}, "selects 3 sites for 5"),
        ([{"select": "all"}], "1 rules for 5"),
        ([7], "7 is not a rule"),
    ):
        with pytest.raises(PlanError, match=text):
            read(moe=pyramid, layers=layers)


EXPERTS = {"experts": 4}


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        (None, {}),
        (False, {}),
        (True, {"stage": 1}),
        ({"stage": 2}, {"stage": 2}),
        ({"stage": "auto"}, {}),
        ({"stage": 1, "cpu_offload": True}, {"stage": 1, "offload": "optimizer"}),
        ({"stage": 2, "cpu_offload": False}, {"stage": 2}),
        ({"stage": 3, "cpu_offload_params": True}, {"stage": 3, "offload": "parameters"}),
        ({"stage": 3, "cpu_offload_param": True}, {"stage": 3, "offload": "parameters"}),
        (
            {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            {"stage": 2, "offload": "optimizer"},
        ),
        ({"stage": 2, "offload_optimizer": {"device": "none"}}, {"stage": 2}),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, {"stage": 3, "offload": "parameters"}),
        (
            {
                "stage": 3,
                "offload_param": {"device": "cpu"},
                "offload_optimizer": {"device": "cpu"},
            },
            {"stage": 3, "offload": "all"},
        ),
        ({"stage": 3, "stage3_prefetch_bucket_size": 0}, {"stage": 3, "prefetch": 0}),
    ],
)
def test_zero(zero: Any, expected: dict[str, Any]) -> None:
    made = read({} if zero is None else {"zero_optimization": zero}).zero
    assert made == type(made).model_validate(expected)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"bf16": {"enabled": True}}, ("bf16", "float32", "same")),
        ({"bfloat16": {"enabled": True}}, ("bf16", "float32", "same")),
        ({"fp16": {"enabled": True}}, ("fp16", "float32", "same")),
        ({"fp16": {"enabled": False}, "bf16": {"enabled": "auto"}}, ("model", "float32", None)),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            ("bf16", "same", "same"),
        ),
        (
            {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
            ("fp16", "same", "same"),
        ),
        (
            {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
            ("bf16", "float32", "float32"),
        ),
        (
            {"bf16": {"enabled": True}, "communication_data_type": "fp32"},
            ("bf16", "float32", "float32"),
        ),
    ],
)
def test_precision(config: dict[str, Any], expected: tuple[str, str, str | None]) -> None:
    zero = read({"zero_optimization": {"stage": 1}, **config}).zero
    assert (zero.precision, zero.master) == expected[:2]
    assert expected[2] is None or zero.reduce == expected[2]


def test_precisions_that_do_not_fit_are_noted() -> None:
    bf16 = {"bf16": {"enabled": True}}
    plan = read({**bf16, "communication_data_type": "fp16"})
    assert "not in fp16" in noted(plan, "communication_data_type")
    plan = read(
        {**bf16, "communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "fp32"}}
    )
    assert plan.zero.reduce == "same"
    assert "accumulated" in noted(plan, "data_types.grad_accum_dtype")
    assert "not scaled" in noted(read({"fp16": {"enabled": True}}), "fp16")
    off = read({"bf16": {"enabled": "auto"}})
    assert "taken as unset" in noted(off, "bf16.enabled")


def test_sections_of_the_config_about_experts() -> None:
    section = {"enabled": True, "ep_size": 2, "moe_experts": [8], "type": "residual"}
    inside = Plan.from_deepspeed({"moe": section})
    rule = inside.layers[0]
    assert (rule.experts, rule.residual, inside.parallel.expert) == (8, "coefficient", 2)
    assert Plan.from_deepspeed({"moe": {"num_experts": [4]}}).layers[0].experts == 4
    old = Plan.from_deepspeed({"ep_size": 2, "moe_experts": [4], "moe_type": "standard"})
    assert (old.layers[0].experts, old.parallel.expert) == (4, 2)
    assert read({"moe": False}) == read()
    assert read({"moe": {"enabled": False, "ep_size": 3}}) == read()
    assert read({"moe": {"mlp_type": "residual"}}).router.aux_loss == 0.01  # stated in MOE_8
    with pytest.raises(PlanError, match=r"moe\.ep_size: 2 contradicts `MoE\.ep_size`: 4"):
        read({"moe": section}, {**MOE_8, "ep_size": 4, "use_residual": True})
    auto = {"enabled": True, "autoep_size": 4, "top_k": 2, "route_norm": False}
    auto |= {"score_func": "sigmoid", "preset_model": "mixtral", "expert_tensor_parallel_size": 1}
    plan = read({"expert_parallel": auto})
    assert (plan.parallel.expert, plan.layers[0].top_k) == (4, 2)
    assert (plan.router.combine, plan.router.score) == ("probability", "sigmoid")
    assert "dense ones" in noted(plan, "expert_parallel.preset_model")
    assert read({"expert_parallel": {**auto, "enabled": False}}) == read()


def test_tensor_parallelism() -> None:
    def parallel(config: Any, **moe: Any) -> tuple[int, int, str]:
        made = read(config, {**MOE_8, **moe}).parallel
        return made.tensor, made.expert, made.experts_in_tp

    assert parallel({"tensor_parallel": {"autotp_size": 2}}) == (2, 1, "replicate")
    assert parallel({"tensor_parallel": {"tp_size": 2}}, ep_size=4) == (2, 4, "fold")
    assert parallel({"tensor_parallel": {"tp": {"tp_size": 4}}}, ep_size=2) == (4, 2, "replicate")
    assert parallel({"mp_size": 2}, ep_size=2, enable_expert_tensor_parallelism=True) == (
        2,
        2,
        "slice",
    )
    assert parallel({"tensor_parallel": {"enabled": False, "autotp_size": 4}}) == (
        1,
        1,
        "replicate",
    )
    with pytest.raises(PlanError, match="mp_size: tensor parallelism over 2 ranks contradicts 4"):
        parallel({"mp_size": 2, "tensor_parallel": {"autotp_size": 4}})


@pytest.mark.parametrize(
    ("tables", "wrap"),
    [
        ((TOP,), lambda part: part),
        ((ZERO,), lambda part: {"zero_optimization": {"stage": 3, **part}}),
        (
            (OFFLOAD,),
            lambda part: {
                "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", **part}}
            },
        ),
        ((PRECISION,), lambda part: {"bf16": {"enabled": True, **part}}),
        ((AUTOEP,), lambda part: {"expert_parallel": {"enabled": True, **part}}),
        ((TENSOR,), lambda part: {"tensor_parallel": {"autotp_size": 1, **part}}),
        ((MOE,), lambda part: {"moe": part}),
    ],
)
def test_every_unmapped_key_is_noted_or_off(tables: Any, wrap: Any) -> None:
    for table in tables:
        for key, unmapped in table.items():
            if key in ("communication_data_type", "data_types"):
                continue  # mapped
            plan = read(wrap({key: 17}))
            (note,) = [note for note in plan.notes if f"{key}: " in note]
            assert "unknown" not in note
            assert "{" not in unmapped.advice.format(value="") or "checkpointing" in key
            for value in unmapped.off:
                notes = read(wrap({key: value})).notes
                assert not any(f"{key}: " in note for note in notes), (key, value)


def test_notes_are_warnings_and_not_part_of_the_plan(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "moeify"):
        plan = read({"train_batch_size": 64, "gradient_clipping": 0.5, "amp": {"enabled": False}})
    assert len(plan.notes) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"from_deepspeed: {note}" for note in plan.notes
    ]
    assert (plan, plan.digest()) == (read(), read().digest())
    assert "notes" not in plan.data()
    assert Plan.of(plan.data()).notes == ()


def test_optimizers_and_schedules() -> None:
    def call(kind: str, **params: Any) -> str:
        return noted(read({"optimizer": {"type": kind, "params": params}}), "optimizer")

    assert call("AdamW", lr=1e-4, weight_decay=0.0) == (
        "build it yourself: mf.optimizer(model, torch.optim.AdamW, lr=0.0001, weight_decay=0.0)"
    )
    assert "torch.optim.AdamW, lr=0.1, weight_decay=0.0)" in call("Adam", lr=0.1)
    assert "torch.optim.Adam, " in call("Adam", lr=0.1, adam_w_mode=False)
    assert "betas=(0.9, 0.95)" in call("Adam", betas=[0.9, 0.95])
    assert "decays neither" in call("Adam", weight_decay=0.1)
    assert "torch.optim.SGD, lr=0.1, momentum=0.9)" in call("SGD", momentum=0.9, lr=0.1)
    assert "torch has no `OneBitAdam`" in call("OneBitAdam", lr=0.1)
    assert call("Adam", lr="auto", freeze_step=3).endswith(
        "`auto` and so not set: lr; not carried over: freeze_step"
    )
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}
    assert "WarmupLR(warmup_num_steps=10)" in noted(read({"scheduler": scheduler}), "scheduler")


@pytest.mark.parametrize(
    ("config", "moe", "text"),
    [
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, MOE_8, "fp16: .* both enabled"),
        ({"zero_optimization": {"stage": 5}}, MOE_8, "zero_optimization.stage: 5 does not fit"),
        ({"zero_optimization": {"stage": "2"}}, MOE_8, "expected an integer"),
        ({"zero_optimization": {"stage": True}}, MOE_8, "expected an integer"),
        ({"zero_optimization": 3}, MOE_8, "zero_optimization: 3 does not fit: expected a mapping"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            MOE_8,
            "zero_optimization.offload_param: needs stage 3; here it is 2",
        ),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload_params": True}},
            MOE_8,
            "zero_optimization.cpu_offload_params: needs stage 3",
        ),
        (
            {
                "zero_optimization": {
                    "stage": 1,
                    "cpu_offload": True,
                    "offload_optimizer": {"device": "none"},
                }
            },
            MOE_8,
            "contradicts `cpu_offload: true`",
        ),
        (
            {
                "zero_optimization": {
                    "stage": 2,
                    "offload_optimizer": {"device": "cpu", "ratio": 0.5},
                }
            },
            MOE_8,
            "offload_optimizer.ratio: goes with stage 3",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "disk"}}},
            MOE_8,
            "device: `disk` does not fit: expected none, cpu, nvme",
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "prefetch_bucket_size": 1,
                    "stage3_prefetch_bucket_size": 2,
                }
            },
            MOE_8,
            "is set twice",
        ),
        (
            {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
            MOE_8,
            "fp16_master_weights_and_grads: needs",
        ),
        ({"bf16": {"enabled": "yes"}}, MOE_8, 'bf16.enabled: "yes" does not fit'),
        ({"expert_parallel": {"enabled": True, "load_balance_coeff": 1.0}}, MOE_8, "null only"),
        ({}, {**MOE_8, "ep_size": 3}, "MoE.ep_size: 3 ranks do not divide 8 .* 1, 2, 4, 8"),
        ({}, {**MOE_8, "k": 0}, "MoE.k: 0 does not fit"),
        ({}, {**MOE_8, "k": 2, "topk": 1}, "MoE.topk: 1 contradicts `MoE.k`: 2"),
        ({}, {**MOE_8, "capacity_factor": 0}, "MoE.capacity_factor"),
        ({}, {**MOE_8, "min_capacity": -1}, "MoE.min_capacity"),
        ({}, {**MOE_8, "noisy_gate_policy": "Noise"}, "expected None, Jitter, RSample"),
        ({}, {**MOE_8, "use_residual": False, "mlp_type": "residual"}, "contradicts"),
        ({}, {"num_experts": 0}, "MoE.num_experts"),
        ({}, {"num_experts": [1, 1]}, "no layer has more than one expert"),
        ({}, {"k": 1}, "MoE: `num_experts` is missing"),
        ({}, None, "the number of experts is missing"),
        ({"expert_parallel": {"enabled": True}}, None, "`num_experts` is missing"),
        ({}, [], "empty list"),
        ({}, [MOE_8, 3], r"MoE\[1\]: 3 does not fit"),
        (7, MOE_8, "a DeepSpeed config is a dict, a path or JSON, not 7"),
        ("nowhere.json", MOE_8, "there is no such file"),
        ("{}}", MOE_8, "<ds_config>:1: not valid JSON"),
    ],
)
def test_errors(config: Any, moe: Any, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        read(config, moe)


def test_files_text_and_lines(tmp_path: Any) -> None:
    text = json.dumps(TEMPLATE, indent=2)
    plan = read(TEMPLATE)
    (tmp_path / "ds.json").write_text(text)
    (tmp_path / "ds.conf").write_text(text)
    packed = base64.urlsafe_b64encode(text.encode()).decode()
    for config in (text, packed, tmp_path / "ds.json", str(tmp_path / "ds.conf")):
        made = read(config)
        assert (made, made.notes) == (plan, plan.notes)
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{\n  "zero_optimization": {\n    "stage": 5\n  }\n}\n')
    with pytest.raises(PlanError, match="expected 0, 1, 2 or 3") as caught:
        read(wrong)
    assert (caught.value.file, caught.value.line) == (str(wrong), 3)
    assert caught.value.path == "zero_optimization.stage"
    good = tmp_path / "good.json"
    good.write_text("{}")
    with pytest.raises(PlanError) as caught:  # the argument is in no file
        read(good, {**MOE_8, "k": 0})
    assert (caught.value.file, caught.value.line, caught.value.path) == (None, None, "MoE.k")
    twice = '{"bf16": {},\n"bf16": {}}'
    with pytest.raises(PlanError, match="already set on line 1"):
        read(twice)


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from moeify.plan.plan import Plan;"
        "Plan.from_deepspeed({'optimizer': {'type': 'Adam'}}, moe={'num_experts': 8});"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
