"""Every private torch API that moeify touches, in one place, each with the reason.

Tested on torch 2.11 and 2.13.
"""

from __future__ import annotations

from moeify.compat.autograd import (
    at_end_of_backward,
    graph_task,
    in_backward,
    next_node_number,
    node_number,
    restore_hooks,
)
from moeify.compat.compilers import (
    call_structure,
    compile_cpp,
    disable_fused_encoder,
    is_compiled_module,
    is_exporting,
    program_module,
    record_under_compiled_checkpointing,
    restore_fused_encoder,
    set_call_structure,
)
from moeify.compat.distributed import (
    dtensor_like,
    fake_store,
    forget_fsdp,
    full_tensor,
    group_ranks,
    is_halves,
    leave_out_of_ddp,
    process_group,
    sharded_halves,
    span_fsdp,
    take_timeout_of_world,
)
from moeify.compat.function_hook import (
    custom_functions,
)
from moeify.compat.operators import (
    base_name,
    named_arguments,
    operator_name,
    telling,
    watching,
)
from moeify.compat.tensors import (
    copy_of,
    fake_like,
    fake_mode,
    foreach_mul_,
    foreach_norm,
    is_fake,
    quiet_fake_tensors,
    storage_id,
    storage_key,
    storage_of,
    version,
)

__all__ = [
    "at_end_of_backward",
    "base_name",
    "call_structure",
    "compile_cpp",
    "copy_of",
    "custom_functions",
    "disable_fused_encoder",
    "dtensor_like",
    "fake_like",
    "fake_mode",
    "fake_store",
    "foreach_mul_",
    "foreach_norm",
    "forget_fsdp",
    "full_tensor",
    "graph_task",
    "group_ranks",
    "in_backward",
    "is_compiled_module",
    "is_exporting",
    "is_fake",
    "is_halves",
    "leave_out_of_ddp",
    "named_arguments",
    "next_node_number",
    "node_number",
    "operator_name",
    "process_group",
    "program_module",
    "quiet_fake_tensors",
    "record_under_compiled_checkpointing",
    "restore_fused_encoder",
    "restore_hooks",
    "set_call_structure",
    "sharded_halves",
    "span_fsdp",
    "storage_id",
    "storage_key",
    "storage_of",
    "take_timeout_of_world",
    "telling",
    "version",
    "watching",
]
