"""Private torch APIs about compiled, exported and fused code."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import fx, nn

Function = TypeVar("Function", bound=Callable[..., Any])


def is_exporting() -> bool:
    """Tell whether `torch.export` is tracing; torch 2.11 claims so in every compilation."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def is_compiled_module(module: nn.Module) -> bool:
    """Tell whether `module` is the wrapper that `torch.compile` returns (a private class)."""
    from torch._dynamo.eval_frame import OptimizedModule

    return isinstance(module, OptimizedModule)


def is_compiled_in_place(module: nn.Module) -> bool:
    """Tell whether `module.compile()` was called, or its `forward` replaced by a compiled function.

    Private because torch offers no way to ask.
    """
    if module._compiled_call_impl is not None:
        return True
    forward = module.__dict__.get("forward")
    made_by_dynamo = hasattr(forward, "_torchdynamo_orig_callable")
    return made_by_dynamo and not getattr(forward, "_torchdynamo_disable", False)


def record_under_compiled_checkpointing() -> None:
    """Let the router keep its losses and counts inside a checkpointed region that is compiled.

    Without this switch dynamo refuses any attribute write there. With it, the write happens in the
    forward and is not repeated by the recomputation in the backward. A private config, because
    torch has no public name for it.
    """
    from torch._dynamo import config

    if hasattr(config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def never_compiled_alone(function: Function) -> Function:
    """Let dynamo compile a function as a part of what calls it only.

    The hooks of a compiled module are code of their own for dynamo, which would compile each with
    guards on its module and soon reach its limit of recompilations. Private because the public
    `torch.compiler.disable` also forbids to inline the function.
    """
    from torch._dynamo.eval_frame import skip_code

    skip_code(function.__code__)
    return function


@never_compiled_alone
def runs_compiled_code() -> bool:
    """Tell whether calls made here run as compiled code, as in the hooks of a compiled module.

    Private because torch tells code only that it is being compiled.
    """
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)


def program_module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """Return an exported program as a module, without guards on its shapes.

    `check_guards` is passed only where it exists. Private because the graph refers to the tracer
    that made it, which unpickling would construct again without its arguments.
    """
    known = inspect.signature(program.module).parameters
    options: dict[str, Any] = {"check_guards": False} if "check_guards" in known else {}
    made = program.module(**options)
    made.graph._tracer_cls = None
    return made


def call_structure(graph: fx.Graph) -> Any:
    """Return how an exported graph nests its arguments and results; None if it does not.

    Private because this lives in the graph's code generator, which pickling a graph leaves out.
    """
    from torch.fx.graph import _PyTreeCodeGen

    codegen = graph._codegen
    return codegen.pytree_info if isinstance(codegen, _PyTreeCodeGen) else None


def set_call_structure(graph: fx.Graph, structure: Any) -> None:
    """Give a graph the structure that `call_structure` returned; None makes it flat."""
    from torch.fx.graph import CodeGen, _PyTreeCodeGen

    graph.set_codegen(CodeGen() if structure is None else _PyTreeCodeGen(structure))


def disable_fused_encoder(module: nn.Module) -> tuple[str, Any] | None:
    """Turn off the fused evaluation kernel of torch's own encoder, or of a layer of it.

    That kernel reads `linear1.weight` and bypasses a replaced `linear1`. A layer checks
    `activation_relu_or_gelu` first, where 0 means "not fusable"; the encoder around it checks
    `use_nested_tensor`. Return the changed attribute and its former value; None for other modules.
    """
    if isinstance(module, nn.TransformerEncoderLayer):
        name, off = "activation_relu_or_gelu", 0
    elif isinstance(module, nn.TransformerEncoder) and hasattr(module, "use_nested_tensor"):
        name, off = "use_nested_tensor", False
    else:
        return None
    former = getattr(module, name)
    setattr(module, name, off)
    return name, former


def restore_fused_encoder(module: nn.Module, former: tuple[str, Any]) -> None:
    """Undo `disable_fused_encoder`."""
    setattr(module, *former)


def cpp_command(source: str, target: str) -> list[str]:
    """Return the command by which Inductor would compile C++ for this processor to a library.

    Private because the public `cpp_extension.load_inline` needs ninja and takes a minute for
    torch's headers. Without a compiler, whatever Inductor raises is raised.
    """
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
    from torch._inductor.cpu_vec_isa import invalid_vec_isa

    # To pick an instruction set, Inductor loads what lies in its cache, which others may share.
    options = CppTorchDeviceOptions(
        device_type="cpu", extra_flags=("-ffp-contract=fast",), vec_isa=invalid_vec_isa
    )
    builder = CppBuilder(name="o", sources="i", BuildOption=options)
    names = {"i": source, builder.get_target_file_path(): target}
    return [names.get(part, part) for part in shlex.split(builder.get_command_line())]
