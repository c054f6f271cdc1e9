"""Every private torch API that moeify touches, in one place, each with the reason.

Tested on torch 2.11 and 2.13.
"""

from __future__ import annotations

from moeify.compat.autograd import at_end_of_backward as at_end_of_backward
from moeify.compat.autograd import graph_task as graph_task
from moeify.compat.autograd import in_backward as in_backward
from moeify.compat.autograd import next_node_number as next_node_number
from moeify.compat.autograd import node_number as node_number
from moeify.compat.autograd import restore_hooks as restore_hooks
from moeify.compat.compilers import call_structure as call_structure
from moeify.compat.compilers import compile_cpp as compile_cpp
from moeify.compat.compilers import disable_fused_encoder as disable_fused_encoder
from moeify.compat.compilers import is_compiled_in_place as is_compiled_in_place
from moeify.compat.compilers import is_compiled_module as is_compiled_module
from moeify.compat.compilers import is_exporting as is_exporting
from moeify.compat.compilers import program_module as program_module
from moeify.compat.compilers import (
    record_under_compiled_checkpointing as record_under_compiled_checkpointing,
)
from moeify.compat.compilers import restore_fused_encoder as restore_fused_encoder
from moeify.compat.compilers import set_call_structure as set_call_structure
from moeify.compat.distributed import dtensor_like as dtensor_like
from moeify.compat.distributed import fake_store as fake_store
from moeify.compat.distributed import forget_fsdp as forget_fsdp
from moeify.compat.distributed import full_tensor as full_tensor
from moeify.compat.distributed import group_ranks as group_ranks
from moeify.compat.distributed import is_halves as is_halves
from moeify.compat.distributed import leave_out_of_ddp as leave_out_of_ddp
from moeify.compat.distributed import process_group as process_group
from moeify.compat.distributed import sharded_halves as sharded_halves
from moeify.compat.distributed import span_fsdp as span_fsdp
from moeify.compat.distributed import take_timeout_of_world as take_timeout_of_world
from moeify.compat.function_hook import custom_functions as custom_functions
from moeify.compat.operators import base_name as base_name
from moeify.compat.operators import before_each_operator as before_each_operator
from moeify.compat.operators import exposed_operators as exposed_operators
from moeify.compat.operators import named_arguments as named_arguments
from moeify.compat.operators import operator_name as operator_name
from moeify.compat.tensors import assert_async as assert_async
from moeify.compat.tensors import copy_of as copy_of
from moeify.compat.tensors import fake_like as fake_like
from moeify.compat.tensors import fake_mode as fake_mode
from moeify.compat.tensors import foreach_mul_ as foreach_mul_
from moeify.compat.tensors import foreach_norm as foreach_norm
from moeify.compat.tensors import is_fake as is_fake
from moeify.compat.tensors import quiet_fake_tensors as quiet_fake_tensors
from moeify.compat.tensors import storage_id as storage_id
from moeify.compat.tensors import storage_key as storage_key
from moeify.compat.tensors import storage_of as storage_of
from moeify.compat.tensors import version as version
