"""What a DeepSpeed config can express and a plan cannot, and what to do instead. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Unmapped:
    """A key without a field in a plan."""

    advice: str  # what to do instead; `{value}` stands for the config's value
    off: tuple[Any, ...] = ()  # values that ask for nothing, so that nothing is lost

    def is_off(self, value: Any) -> bool:
        """Tell whether a value asks for nothing."""
        if isinstance(value, Mapping):
            return value.get("enabled") is False or not value
        return any(value == each and type(value) is type(each) for each in self.off)


_OFF = (False, 0, 0.0)
_ENGINE = "belongs to DeepSpeed's engine and has no counterpart here"
_LOOP = "left to your loop"


def _keys(advice: str, off: tuple[Any, ...], names: str) -> dict[str, Unmapped]:
    return dict.fromkeys(names.split(), Unmapped(advice, off))


TOP: Final[Mapping[str, Unmapped]] = {
    "gradient_clipping": Unmapped(
        "clip before the step: mf.clip_grad_norm_(model, {value})", (0, 0.0)
    ),
    "train_batch_size": Unmapped("{value} samples over all ranks are up to your data loader"),
    "train_micro_batch_size_per_gpu": Unmapped("{value} per rank is up to your data loader"),
    "gradient_accumulation_steps": Unmapped(
        "divide the loss by {value} and step after {value} batches", (1,)
    ),
    "activation_checkpointing": Unmapped(
        "checkpoint in the model, with use_reentrant=False: Hugging Face's "
        'gradient_checkpointing_enable(gradient_checkpointing_kwargs={{"use_reentrant": False}})'
    ),
    "prescale_gradients": Unmapped("gradients are averaged, not scaled before they are sent", _OFF),
    "gradient_predivide_factor": Unmapped("gradients are averaged in one piece", (1, 1.0)),
    "gradient_allreduce_op": Unmapped(
        "gradients are averages over the ranks; multiply the loss by their number for sums",
        ("mean",),
    ),
    "managed_gradient_accumulation": Unmapped(f"gradient accumulation is {_LOOP}"),
    "sparse_gradients": Unmapped("embedding gradients stay dense", _OFF),
    "use_data_before_expert_parallelism": Unmapped(
        "ranks of an expert group are consecutive; only the order of ranks differs", _OFF
    ),
    "amp": Unmapped("convert without it; `bf16` or torch.autocast in your loop"),
    "torch_autocast": Unmapped("use torch.autocast in your loop"),
    "pipeline": Unmapped("there is no pipeline parallelism; the model runs in one stage"),
    "sequence_parallel_size": Unmapped("there is no sequence parallelism", (1,)),
    "elasticity": Unmapped("the world size is fixed; batches are up to your data loader"),
    "curriculum_learning": Unmapped(f"shorter sequences at the start are {_LOOP}"),
    "data_efficiency": Unmapped(f"sampling and token dropping of data are {_LOOP}"),
    "progressive_layer_drop": Unmapped("layers are not dropped"),
    "compression_training": Unmapped("moeify neither prunes nor quantizes"),
    "weight_quantization": Unmapped("moeify does not quantize"),
    "quantize_training": Unmapped("moeify does not quantize"),
    "eigenvalue": Unmapped("moeify does not quantize"),
    "sparse_attention": Unmapped("attention is the model's own"),
    "hybrid_engine": Unmapped(_ENGINE),
    "autotuning": Unmapped("nothing is tuned; `moeify simulate` compares layouts"),
    "compile": Unmapped("call torch.compile(model) yourself"),
    "checkpoint": Unmapped("save with mf.save_sharded(model, ...)"),
    "nebula": Unmapped("save with mf.save_sharded(model, ...)"),
    "datastates_ckpt": Unmapped("save with mf.save_sharded(model, ...)"),
    "flops_profiler": Unmapped("use torch.profiler"),
    "dataloader_drop_last": Unmapped("is an argument of your data loader", _OFF),
    "aio": Unmapped("nothing is swapped to disk"),
    "seq_parallel_communication_data_type": Unmapped("there is no sequence parallelism", ("fp32",)),
    "communication_data_type": Unmapped(
        "gradients are reduced in float32 or in the precision of `fp16`/`bf16`, not in {value}"
    ),
    **_keys(
        "prints or measures only; log it in your loop",
        _OFF,
        "steps_per_print wall_clock_breakdown memory_breakdown dump_state comms_logger timers "
        "tensorboard wandb csv_monitor comet log_level monitor_config",
    ),
    **_keys(
        _ENGINE,
        _OFF,
        "disable_allgather graph_harvesting zero_allow_untested_optimizer "
        "zero_force_ds_cpu_optimizer vocabulary_size data_types allgather_size",
    ),
}
"""Of the config itself."""

_BUCKETS = "FSDP2 and `zero.prefetch` decide how much is sent at once; changes no number"
_FSDP = "is done another way here; changes no number"

ZERO: Final[Mapping[str, Unmapped]] = {
    "zero_hpz_partition_size": Unmapped(
        "parameters are gathered over all ranks that share them, not from a second copy on the "
        "node: less memory, more traffic",
        (0, 1),
    ),
    "mics_shard_size": Unmapped("parameters are sharded over all their ranks", (-1, 0)),
    "zero_quantized_weights": Unmapped("weights are sent unquantized", _OFF),
    "zero_quantized_nontrainable_weights": Unmapped("weights are sent unquantized", _OFF),
    "zero_quantized_gradients": Unmapped("gradients are sent unquantized", _OFF),
    "zeropp_loco_param": Unmapped("gradients are sent unquantized"),
    "zenflow": Unmapped("offloaded optimizers step in one piece; numbers differ"),
    "param_persistence_threshold": Unmapped(
        "small parameters are partitioned too; changes no number"
    ),
    "model_persistence_threshold": Unmapped("changes no number"),
    "load_from_fp32_weights": Unmapped(
        "master weights start as the model's own weights; convert a float32 model", (False,)
    ),
    "elastic_checkpoint": Unmapped("mf.load_sharded loads into any number of ranks", _OFF),
    "ignore_unused_parameters": Unmapped("unused parameters are allowed", (True,)),
    "gather_16bit_weights_on_model_save": Unmapped("save with mf.save_sharded(model, ...)", _OFF),
    "gather_fp16_weights_on_model_save": Unmapped("save with mf.save_sharded(model, ...)", _OFF),
    "save_muon_momentum_buffer_in_memory": Unmapped(_ENGINE, _OFF),
    **_keys(
        _BUCKETS,
        (),
        "reduce_bucket_size allgather_bucket_size sub_group_size prefetch_bucket_size "
        "max_live_parameters max_reuse_distance",
    ),
    **_keys(
        _FSDP,
        (),
        "contiguous_gradients reduce_scatter overlap_comm use_multi_rank_bucket_allreduce "
        "allgather_partitions round_robin_gradients module_granularity_threshold "
        "use_all_reduce_for_fetch_params allgather_sequential legacy_stage1 "
        "mics_hierarchical_params_gather memory_efficient_linear pipeline_loading_checkpoint "
        "override_module_apply log_trace_cache_warnings enable_sanity_checks leaf_module "
        "cpu_offload_use_pin_memory",
    ),
}
"""Of `zero_optimization`; with or without `stage3_` in front."""

OFFLOAD: Final[Mapping[str, Unmapped]] = {
    "ratio": Unmapped("all of it is offloaded", (1, 1.0)),
    "super_offload": Unmapped(_ENGINE, _OFF),
    **_keys("nothing is swapped to disk", (), "nvme_path buffer_count buffer_size max_in_cpu"),
    **_keys(
        _FSDP, _OFF, "pin_memory pipeline_read pipeline_write pipeline fast_init cpuadam_cores_perc"
    ),
}
"""Of `offload_optimizer` and `offload_param`."""

PRECISION: Final[Mapping[str, Unmapped]] = {
    "auto_cast": Unmapped("cast the inputs yourself", _OFF),
    "immediate_grad_update": Unmapped("when gradients are added up changes no number", _OFF),
    "check_grad_overflow": Unmapped(
        "a step with infinite gradients is not skipped: "
        "mf.clip_grad_norm_(model, max_norm, error_if_nonfinite=True) raises",
        (False,),
    ),
    "bf16_optimizer_states": Unmapped(
        "states have the dtype of what the optimizer updates: `bf16_master_weights_and_grads`",
        _OFF,
    ),
    **_keys(
        "losses are not scaled here: do it in your loop, or use bf16",
        (),
        "loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
        "min_loss_scale",
    ),
}
"""Of `bf16` and `fp16`."""

MOE: Final[Mapping[str, Unmapped]] = {
    "expert": Unmapped("experts are copies of each site's own MLP, not of this module"),
    "use_tutel": Unmapped("moeify has kernels of its own (`kernel: auto`)", _OFF),
    "create_moe_param_group": Unmapped(
        "mf.optimizer(model) does it; groups alone: mf.param_groups(model)", _OFF
    ),
    "ds_inference": Unmapped("a converted model needs no engine; call model.eval()", _OFF),
    "mos": Unmapped(
        "mixture of students: give the plan a `student:` section, see mf.student", _OFF
    ),
    "kd": Unmapped("distillation: the plan's `student` has `distill`, see mf.distill", _OFF),
    "pipeline_model_parallel_size": Unmapped("there is no pipeline parallelism", (1,)),
    "ep_group": Unmapped("groups come from the plan's `parallel`"),
    "expert_group": Unmapped("groups come from the plan's `parallel`"),
    "ep_mp_group": Unmapped("groups come from the plan's `parallel`"),
    **_keys(
        "distillation: the plan's `student` has `distill`, see mf.distill",
        (),
        "kd_alpha_ce kd_beta_ce kd_temp num_experts_teacher num_layers_teacher load_teacher "
        "hidden_size_teacher num_attention_heads_teacher reset_iteration",
    ),
}
"""Of an MoE layer's or launch script's arguments."""

AUTOEP: Final[Mapping[str, Unmapped]] = _keys(
    "is about models that already have experts; moeify converts dense ones",
    (None, False),
    "validate_folding_routing preset_model moe_layer_pattern expert_pattern router_pattern "
    "use_grouped_mm disable_triton_grouped_mm route_scale score_apply combine_impl "
    "num_expert_groups num_limited_groups routed_scaling_factor expert_w1 expert_w2 expert_w3 "
    "num_experts_attr top_k_attr has_shared_experts shared_experts_pattern "
    "shared_experts_gate_pattern",
)
"""Of `expert_parallel`."""

TENSOR: Final[Mapping[str, Unmapped]] = _keys(
    "what can be sliced is derived from the model's graph",
    _OFF,
    "dtype tp_overlap_comm partition_config injection_policy_tuple injection_policy preset_model "
    "keep_module_on_host replace_with_kernel_inject kernel_inject tp_grain_size mpu tp_group",
)
"""Of `tensor_parallel`."""

_TORCH: Final[Mapping[str, str]] = {
    "adamw": "AdamW",
    "adam": "AdamW",  # DeepSpeed's Adam decays as AdamW does unless `adam_w_mode` is false
    "adagrad": "Adagrad",
    "sgd": "SGD",
    "rmsprop": "RMSprop",
}
_OPTIONS = ("lr", "betas", "eps", "weight_decay", "momentum", "nesterov", "dampening", "alpha")


def optimizer_advice(section: Mapping[str, Any]) -> str:
    """Return the call that makes a config's `optimizer`, or what to do where torch has none."""
    kind, given = str(section.get("type", "")), section.get("params")
    params = dict(given) if isinstance(given, Mapping) else {}
    word = kind.lower()
    name = _TORCH.get(word)
    if word == "adam" and params.get("adam_w_mode") is False:
        name = "Adam"
    if name is None:
        return f"torch has no `{kind}`: give mf.optimizer(model, YourOptimizer, ...) a class for it"
    if word in ("adam", "adamw"):
        # DeepSpeed does not decay by default, torch's AdamW does by 0.01.
        fixed = params.get("torch_adam") is True
        params = params if fixed else {"weight_decay": 0.0, **params}
    used = {key: params[key] for key in _OPTIONS if params.get(key, "auto") not in (None, "auto")}
    text = "".join(
        f", {key}={tuple(value) if isinstance(value, list) else value!r}"
        for key, value in sorted(used.items(), key=lambda item: _OPTIONS.index(item[0]))
    )
    advice = f"build it yourself: mf.optimizer(model, torch.optim.{name}{text})"
    if used.get("weight_decay"):
        advice += "; it decays neither biases nor norms unless you give `groups`"
    open_ = sorted(key for key, value in params.items() if value == "auto")
    lost = sorted(set(params) - set(_OPTIONS) - {"torch_adam", "adam_w_mode"} - set(open_))
    advice += f"; `auto` and so not set: {', '.join(open_)}" if open_ else ""
    return advice + (f"; not carried over: {', '.join(lost)}" if lost else "")


def scheduler_advice(section: Mapping[str, Any]) -> str:
    """Return what to do about a config's `scheduler`, with its values."""
    kind, given = str(section.get("type", "")), section.get("params")
    params = dict(given) if isinstance(given, Mapping) else {}
    values = ", ".join(f"{key}={value!r}" for key, value in params.items())
    return f"build it yourself with torch.optim.lr_scheduler: {kind}({values})"
