"""Prove that a model's code runs with slices: run it with projections of one rank's width.

The run is on fake tensors where discovery's was. Every value must have the shape that the rules
predict, and every constant must be the same, so that a head count written into the code, or a
width used as a number, is detected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import fx, nn

from moeify import compat
from moeify.capture.capture import Capture, ExampleInputs, capture, record_fake, split_inputs
from moeify.errors import CaptureError
from moeify.passes.infra.records import record_of
from moeify.passes.match.operations import RESHAPES, op_name
from moeify.tensor_parallel.apply import Way

_SIZED = RESHAPES | {"expand"}
"""Operations whose arguments are sizes."""


class TrialRun:
    """Run a model with some of its projections narrower; `first` is the run with whole ones."""

    def __init__(
        self, model: nn.Module, inputs: ExampleInputs, first: Capture, tensor: int
    ) -> None:
        self.model, self.inputs, self.tensor = model, inputs, tensor
        self.nodes, self.fake = first.nodes, first.mode == "fake"

    def failure(self, ways: Mapping[str, Way], dims: Mapping[fx.Node, int]) -> str:
        """Return why the code does not fit these slices, or "".

        `dims` is the dimension in which each sliced value is sliced.
        """
        with self._narrow(ways):
            again, reason = self._run()
        if reason:
            return f"its code does not run with a slice of its width: {reason}"
        for before, after in zip(self.nodes, again, strict=False):
            reason = self._differs(before, after, dims.get(before))
            if reason:
                return reason
        if len(self.nodes) != len(again):
            return "its code takes another path with a slice of its width"
        return ""

    def _run(self) -> tuple[list[fx.Node], str]:
        """Record the model as discovery did; return the nodes, or why it does not run."""
        if self.fake:
            with compat.quiet_fake_tensors():
                found, reason = record_fake(self.model, *split_inputs(self.inputs), False)
            return ([], reason) if found is None else (found[1].nodes, "")
        try:
            return capture(self.model, self.inputs).nodes, ""
        except CaptureError as error:
            return [], str(error)

    @contextmanager
    def _narrow(self, ways: Mapping[str, Way]) -> Iterator[None]:
        """Give projections narrower parameters, views of their own, inside the context."""
        former: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for path, way in ways.items():
                module = self.model.get_submodule(path)
                for key, parameter in list(module._parameters.items()):
                    if parameter is None or (way == "rowwise" and key == "bias"):
                        continue
                    former.append((module, key, parameter))
                    dim = 0 if way == "colwise" else 1
                    share = parameter.detach().narrow(dim, 0, parameter.shape[dim] // self.tensor)
                    module._parameters[key] = nn.Parameter(share, parameter.requires_grad)
            yield
        finally:
            for module, key, parameter in former:
                module._parameters[key] = parameter

    def _differs(self, before: fx.Node, after: fx.Node, dim: int | None) -> str:
        old, new = record_of(before), record_of(after)
        assert old is not None
        assert new is not None
        name = op_name(before)
        if name != op_name(after):
            return f"`{name}` becomes `{op_name(after)}` with a slice of its width"
        wanted = old.shapes
        if dim is not None:
            wanted = tuple(
                (*size[:dim], size[dim] // self.tensor, *size[dim + 1 :]) for size in old.shapes
            )
        if new.shapes != wanted:
            return (
                f"`{name}` has sizes written into its code: a slice should be {_show(wanted)}, "
                f"and is {_show(new.shapes)}"
            )
        if name not in _SIZED and _constants(before) != _constants(after):
            return f"`{name}` computes with its width as a number"
        return ""


def _constants(node: fx.Node) -> str:
    """Return the arguments of a node without those that are nodes."""
    return repr(fx.node.map_arg((node.args, node.kwargs), lambda n: None))


def _show(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join(str(list(size)) for size in shapes)
