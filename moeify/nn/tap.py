"""Taps: how the input of an MLP reaches a block that stands where the last projection stood.

A tap stands where a first projection stood. It hands its input over to the block, through a slot
that belongs to the thread that runs the forward, so that concurrent forwards never meet, and for
the length of one call of the module around both, so that an interrupted one leaves nothing behind.
What a model does otherwise than when it was recorded (a projection called once more, or with
another input, or for something else) is an error, never a wrong number.

Shapes: D model width.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeify import compat
from moeify.errors import ForwardError
from moeify.nn.watch import Watched, assert_unchanged


class Slot:
    """The input that one tap hands over, seen by the thread that put it there.

    Copied and pickled it is a fresh one: what is in it belongs to a running forward.
    """

    def __init__(self, tap: str, block: str) -> None:
        self.tap, self.block = tap, block  # paths in the model, for messages
        self._held = threading.local()  # of this very class: Dynamo follows no subclass of it

    def put(self, value: Tensor) -> None:
        """Keep a value for the block.

        Raises:
            ForwardError: The one before was not taken.
        """
        # A recomputation may stop early, before the block runs.
        if self.is_full and not compat.in_backward():
            self.drop()
            raise _error(
                f"{self.tap} was called again before {self.block} had run: the MoE block there "
                "reads its input once, as the dense model did when it was converted. Call each of "
                "them once per MLP, or leave this layer out of the plan (`select`). If an error "
                "had interrupted the layer, run it once more."
            )
        uncounted = torch.compiler.is_compiling() or value.is_inference()
        self._held.value = value
        self._held.version = None if uncounted else compat.version(value)

    def take(self) -> Tensor:
        """Return the value and release it.

        Raises:
            ForwardError: There is none, or it was changed in place since.
        """
        value: Tensor | None = getattr(self._held, "value", None)
        if value is None:
            raise _error(
                f"{self.block} ran before its tap {self.tap}, from which the MoE block gets its "
                "input: call the whole layer, in the order of the dense model"
            )
        changed = not torch.compiler.is_compiling() and self._was_changed(value)
        self.drop()
        if changed:
            raise _error(
                f"the input of {self.tap} was changed in place before {self.block} had run, which "
                "reads it: change a copy, or leave this layer out of the plan (`select`)"
            )
        return value

    def drop(self) -> None:
        """Release the value, if there is one."""
        self._held.value = self._held.version = None

    @property
    def is_full(self) -> bool:
        """Whether a value waits for the block."""
        return getattr(self._held, "value", None) is not None

    def _was_changed(self, value: Tensor) -> bool:
        version = getattr(self._held, "version", None)  # None where nothing counts
        return version is not None and version != compat.version(value)

    def __reduce__(self) -> tuple[Any, ...]:
        return Slot, (self.tap, self.block)


class Tap(nn.Module):
    """Replaces a first projection: hands its input over to the block.

    What it returns goes through the activation in between to the block, which ignores it: NaN, so
    that nobody takes it for a hidden value, of the smallest width on which that activation runs, in
    dimension `channel` (-1, or 1 for convolutions).
    """

    def __init__(self, slot: Slot, width: int, channel: int = -1) -> None:
        super().__init__()
        self.slot, self.width, self.channel = slot, width, channel

    def forward(self, input: Tensor) -> Tensor:
        """Hand `input` [..., D] over and return NaN [..., width]."""
        self.slot.put(input)
        shape = list(input.shape)
        shape[self.channel] = self.width
        return input.new_full(shape, math.nan)

    def extra_repr(self) -> str:
        return f"width={self.width}, channel={self.channel}"


class TapReader(nn.Module):
    """Gives a block the input that its taps, one for each first projection, hand over.

    `watched` are attributes of the layer around whose values are in the block.
    """

    def __init__(self, slots: Sequence[Slot], watched: Sequence[Watched] = ()) -> None:
        super().__init__()
        self.slots, self.watched = tuple(slots), tuple(watched)

    def forward(self, placeholder: Tensor) -> Tensor:
        """Return the taps' input [..., D]; the placeholder is not read.

        Raises:
            ForwardError: A tap has not run, or they had different inputs.
            UnsupportedModuleError: A watched attribute has changed.
        """
        assert_unchanged(self.watched)
        first, *others = [slot.take() for slot in self.slots]
        for slot, other in zip(self.slots[1:], others, strict=True):
            if other is not first:
                _assert_same(first, other, self.slots[0], slot)
        return first

    def extra_repr(self) -> str:
        return ", ".join(slot.tap for slot in self.slots)


def _error(message: str) -> RuntimeError:
    # While it traces, Dynamo shows the text of a builtin error only.
    return RuntimeError(message) if torch.compiler.is_compiling() else ForwardError(message)


def _assert_same(first: Tensor, other: Tensor, slot: Slot, another: Slot) -> None:
    """Assert that two tensors are one value, reshaped or cast on the way at most."""
    message = (
        f"{slot.tap} and {another.tap} got different inputs, where the dense model gave both the "
        f"same when it was converted: the MoE block at {slot.block} has one input. Leave this "
        "layer out of the plan (`select`)."
    )
    if first.numel() != other.numel() or first.requires_grad != other.requires_grad:
        raise _error(message)
    compiling = torch.compiler.is_compiling()
    if not compiling and (first.is_meta or compat.is_fake(first) or _is_same_memory(first, other)):
        return
    with torch.no_grad():  # a copy, or a compiled graph, where addresses say nothing
        left, right = first.reshape(-1), other.reshape(-1).to(first.dtype)
        same = ((left == right) | ((left != left) & (right != right))).all()
    if compiling:
        compat.assert_async(same, message)
    elif not bool(same):
        raise _error(message)


def _is_same_memory(first: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors of as many elements are one memory in one order."""
    plain = first.is_contiguous() and other.is_contiguous() and first.dtype == other.dtype
    return plain and first.data_ptr() == other.data_ptr()


class TapScope:
    """Bounds what taps hand over to one call of the module around them and their block.

    Its hooks on that module drop what an interrupted call left, and refuse a call that ends while
    an input is still waiting: the hidden value of that tap was used for something else.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)

    def attach(self, around: nn.Module) -> None:
        """Put the hooks on a module."""
        around.register_forward_pre_hook(self.begin, prepend=True)
        around.register_forward_hook(self.check)
        around.register_forward_hook(self.end, always_call=True)

    def begin(self, module: nn.Module, args: Any) -> None:
        """Drop what a call that was interrupted may have left."""
        for slot in self.slots:
            slot.drop()

    def check(self, module: nn.Module, args: Any, output: Any) -> None:
        """Refuse to end while an input waits.

        Raises:
            ForwardError: A block did not run after its tap.
        """
        for slot in self.slots:
            if slot.is_full:
                slot.drop()
                raise _error(
                    f"{slot.tap} was called, but {slot.block} was not called after it: the MoE "
                    "block there computes both, so that there is no hidden value for anything "
                    "else. Leave this layer out of the plan (`select`)."
                )

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Release everything, after an error too."""
        for slot in self.slots:
            slot.drop()

    @staticmethod
    def detach(around: nn.Module) -> None:
        """Take the hooks of every scope off a module."""
        for hooks in (around._forward_pre_hooks, around._forward_hooks):
            for key in [k for k, hook in hooks.items() if is_of_scope(hook)]:
                del hooks[key]
                around._forward_hooks_always_called.pop(key, None)


def is_of_scope(hook: Any) -> bool:
    """Tell whether a module's hook is one that a scope put there."""
    return isinstance(getattr(hook, "__self__", None), TapScope)
