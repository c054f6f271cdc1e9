"""Record one forward pass of any model as a `torch.fx.Graph`.

A `TorchFunctionMode` sees every torch call, and module hooks tell which module made it. The model
runs once, in evaluation mode and without gradients, on fake tensors where it can (no weight is
read, no memory is taken) and on the real ones otherwise. Afterwards its parameters, buffers,
attributes, training flags, hooks and the random state are as before.

The recorded graph is flat: calls of torch functions and methods, `get_attr` for parameters and
buffers, one placeholder per tensor of the inputs. Sizes that the model computed in Python are
constants in it. It serves discovery; `moeify.export` returns a graph that runs at other sizes.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from moeify import compat
from moeify.capture.attribute_reads import AttributeRead, attribute_reads
from moeify.capture.leaked_fakes import ONE_AT_A_TIME, Variables, remove_leaked
from moeify.capture.preserve import preserved
from moeify.capture.recorder import ModuleCall, Recorder
from moeify.capture.torch_calls import Args, Kwargs, tensors_in
from moeify.errors import CaptureError
from moeify.passes.infra.records import record_of
from moeify.units import dtype_name

log = logging.getLogger("moeify")

ExampleInputs = Mapping[str, Any] | Sequence[Any] | Tensor
Mode: TypeAlias = Literal["fake", "real"]


@dataclass(slots=True)
class Capture:
    """A recorded forward pass."""

    graph_module: fx.GraphModule  # its `get_attr` nodes refer to the model's own parameters
    nodes: list[fx.Node]  # those that ran, in order (placeholders and `get_attr` excluded)
    calls: list[ModuleCall]  # in order of entry
    mode: Mode
    seconds: float
    training: bool = False
    fallback: str = ""  # why fake tensors could not be used
    # of attributes of modules; recorded in a second run only, so that the first one is undisturbed
    reads: list[AttributeRead] = field(default_factory=list)

    def chain(self, node: fx.Node) -> list[ModuleCall]:
        """Return the module calls around `node`, innermost first."""
        record = record_of(node)
        found, index = [], -1 if record is None else record.call
        while index >= 0:
            found.append(self.calls[index])
            index = self.calls[index].parent
        return found


def capture(model: nn.Module, example_inputs: ExampleInputs, *, training: bool = False) -> Capture:
    """Run `model` once, unchanged, and record what it does; in training mode on fake tensors only.

    In training mode gradients are on, else they are off.

    Raises:
        CaptureError: The forward pass fails on these inputs, with fake and with real tensors, or
            the model left a fake tensor in a place that cannot be restored.
    """
    return capture_runs(model, example_inputs, training=training)[0]


def capture_runs(
    model: nn.Module,
    example_inputs: ExampleInputs,
    later: Callable[[Mode], Sequence[ExampleInputs]] = lambda mode: (),
    *,
    training: bool = False,
    watch: bool = False,
) -> list[Capture]:
    """Run `model` several times, each on the state that the run before left, and record each.

    `later` returns the inputs of the runs after the first, given whether tensors are fake or real.
    The result ends before the first of them that fails. With `watch` the second run notes which
    attributes the model's modules read. Arguments and errors are else those of `capture`.
    """
    started = time.perf_counter()
    _refuse_unready(model)
    fakes = [split_inputs(example_inputs), *map(split_inputs, later("fake"))]
    found, reason = _record_fakes(model, fakes, training, watch)
    mode: Mode = "fake" if found else "real"
    if not found and training:
        raise CaptureError(f"the model cannot run on fake tensors in training mode ({reason})")
    if not found:
        if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            raise CaptureError(
                f"the model is on meta and cannot run on fake tensors ({reason}); "
                f"check example_inputs={_describe(example_inputs)}, or load its weights first"
            )
        runs = [split_inputs(example_inputs), *map(split_inputs, later("real"))]
        try:
            found = _record(model, runs, False, None, watch)
        except Exception as error:
            raise CaptureError(
                f"the model does not run on the example inputs: {type(error).__name__}: "
                f"{_first_line(error)}; check example_inputs={_describe(example_inputs)}"
            ) from error
    seconds = time.perf_counter() - started
    return [
        Capture(gm, run.nodes, run.calls, mode, seconds, training, reason, run.reads)
        for gm, run in found
    ]


def record_fake(
    model: nn.Module, args: Args, kwargs: Kwargs, training: bool
) -> tuple[tuple[fx.GraphModule, Recorder] | None, str]:
    """Record on fake tensors and leave none of them behind; or return None and the reason."""
    found, reason = _record_fakes(model, [(args, kwargs)], training)
    return (found[0] if found else None), reason


Recorded: TypeAlias = tuple[fx.GraphModule, Recorder]


def _record_fakes(
    model: nn.Module, runs: Sequence[tuple[Args, Kwargs]], training: bool, watch: bool = False
) -> tuple[list[Recorded], str]:
    fakes: list[weakref.ref[Tensor]] = []
    found: list[Recorded] = []
    reason = ""
    with ONE_AT_A_TIME:
        variables = Variables(model)
        try:
            found = _record(model, runs, training, fakes, watch)
        except Exception as error:  # a model may raise anything
            reason = f"{type(error).__name__}: {_first_line(error)}"
        remove_leaked(fakes, variables)
    return found, reason


def split_inputs(example_inputs: ExampleInputs) -> tuple[Args, Kwargs]:
    """Turn example inputs into positional and keyword arguments.

    Raises:
        CaptureError: They are neither a mapping, a sequence nor a tensor.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), {str(key): value for key, value in example_inputs.items()}
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    raise CaptureError(
        "example_inputs must be a dict of keyword arguments, a tuple of positional ones or a "
        f"tensor, not {type(example_inputs).__name__}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _describe(inputs: object) -> str:
    if isinstance(inputs, Tensor):
        return f"{tuple(inputs.shape)} {dtype_name(inputs.dtype)}"
    if isinstance(inputs, Mapping):
        return "{" + ", ".join(f"{k}: {_describe(v)}" for k, v in inputs.items()) + "}"
    if isinstance(inputs, list | tuple):
        return "(" + ", ".join(_describe(v) for v in inputs) + ")"
    return repr(inputs)[:60]


def _refuse_unready(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if compat.is_compiled_module(module) or compat.is_compiled_in_place(module):
            raise CaptureError(f"{path or 'the model'} is compiled: convert first, compile after")
    for name, tensor in model.named_parameters():
        if isinstance(tensor, nn.parameter.UninitializedParameter):
            raise CaptureError(f"{name} is uninitialised: run the model once, then convert it")


def _record(
    model: nn.Module,
    runs: Sequence[tuple[Args, Kwargs]],
    training: bool,
    fakes: list[weakref.ref[Tensor]] | None,
    watch: bool,
) -> list[Recorded]:
    """Run the model under recorders; on fake tensors if `fakes` is a list to collect them in."""
    recorders: list[Recorder] = []
    names = {id(t): n for n, t in model.named_parameters()}
    names |= {id(t): n for n, t in model.named_buffers() if id(t) not in names}
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        scripts = [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
        mode: Any = None
        if fakes is not None:
            if any(True for script in scripts for _ in script.parameters()):
                raise RuntimeError("weights of TorchScript modules cannot be replaced by fakes")
            mode = compat.fake_mode()
            names, runs = _swap_in_fakes(model, names, runs, mode)
        for script in scripts:
            stack.callback(script.train, script.training)
            script.train(training)
        for module in model.modules():
            module.__dict__["training"] = training
        # Training has gradients, so that what runs without them there can be told.
        stack.enter_context(torch.enable_grad() if training else torch.no_grad())
        if mode is not None:
            stack.enter_context(mode)
            stack.enter_context(compat.exposed_operators())  # above the fakes, to see all
        for args, kwargs in runs:
            recorder = Recorder(model, names, fakes, grads=training)
            second = watch and len(recorders) == 1
            watching = _watching(model, recorder) if second else nullcontext()
            quiet = compat.quiet_fake_tensors() if recorders else nullcontext()
            try:
                with quiet, recorder.hooked(args, kwargs), watching, recorder:
                    outputs = model(*args, **kwargs)
            except Exception as error:  # a model may raise anything
                if not recorders:
                    raise
                log.debug("a later run fails: %s: %s", type(error).__name__, _first_line(error))
                break
            recorder.seal(list(tensors_in(outputs)))
            recorders.append(recorder)
    return [(recorder.finish(), recorder) for recorder in recorders]


def _watching(model: nn.Module, recorder: Recorder) -> AbstractContextManager[None]:
    return attribute_reads(model, lambda: len(recorder.nodes), recorder.reads)


def _swap_in_fakes(
    model: nn.Module, names: dict[int, str], runs: Sequence[tuple[Args, Kwargs]], mode: Any
) -> tuple[dict[int, str], list[tuple[Args, Kwargs]]]:
    """Replace parameters and buffers by fakes, in the modules' own tables (restored later)."""
    fakes: dict[int, Tensor] = {}

    def fake(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in fakes:
                fakes[id(value)] = compat.fake_like(mode, value)
            return fakes[id(value)]
        if type(value) in (list, tuple):
            return type(value)(fake(part) for part in value)
        if isinstance(value, dict):
            return {key: fake(part) for key, part in value.items()}
        return value

    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for key, tensor in table.items():
                if tensor is not None:
                    table[key] = fake(tensor)
    named = {id(fakes[key]): name for key, name in names.items() if key in fakes}
    return named, [(fake(args), fake(kwargs)) for args, kwargs in runs]
