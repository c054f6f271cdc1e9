"""ZeRO stage 1: every rank steps over its own piece of each parameter, then all gather them.

    gradient, whole on each rank -> its piece -> inner optimizer -> piece -> all-gather -> parameter

Parameters and gradients stay whole; only what the optimizer keeps is partitioned: its states, and
the master weights if it updates other weights than the model computes with. The same code keeps
both in CPU memory. A piece is a DTensor, so that norms of a whole parameter are right.

Source:
    ZeRO: Rajbhandari et al. 2020, section 5 (P_os). Offload: Ren et al. 2021, ZeRO-Offload.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from moeify import compat
from moeify.errors import CheckpointError, MoeifyError
from moeify.zero.pieces import Cut, Piece, buckets, gather, local_part, make_piece

__all__ = ["Cut", "Guard", "ShardedOptimizer"]


class ShardedOptimizer(Optimizer):
    """An optimizer whose states are partitioned over the ranks that hold the same parameters.

    `param_groups` hold the model's parameters, so learning-rate schedulers, clipping and gradient
    scaling work as usual; `inner` is the optimizer over the pieces. Every rank makes it with the
    same groups and steps equally often; gradients are reduced, so a parameter has one on all ranks
    or on none. It updates its pieces, which may be separate from the model (`has_masters`); values
    written into parameters in place, for instance by `load_state_dict`, are noticed at the next
    step.

    Args:
        groups: Parameters or groups of them, as for any optimizer.
        inner: Class of the optimizer; one that needs no closure.
        cuts: By `id` of a parameter, how it is partitioned; others are kept whole on every rank.
        device: Where pieces and states live; that of the parameters if None.
        master: Dtype of the pieces; that of the parameters if None.
        masters: By `id` of a parameter, this rank's piece of it before it was cast.
        options: What `inner` takes.

    Raises:
        MoeifyError: A cut does not fit its parameter.

    Example:
        >>> layer = nn.Linear(2, 2).bfloat16()
        >>> made = ShardedOptimizer(
        ...     layer.parameters(), torch.optim.SGD, {}, master=torch.float32, lr=0.1
        ... )
        >>> made.shard_of(layer.weight).dtype, made.has_masters
        (torch.float32, True)
    """

    def __init__(
        self,
        groups: Iterable[Any],
        inner: type[Optimizer],
        cuts: Mapping[int, Cut],
        *,
        device: torch.device | str | None = None,
        master: torch.dtype | None = None,
        masters: Mapping[int, Tensor] | None = None,
        **options: Any,
    ) -> None:
        self._cuts, self._starts = dict(cuts), dict(masters or {})
        self._device = None if device is None else torch.device(device)
        self._master = master
        self._pieces: dict[int, Piece] = {}
        self._inner: Optimizer | None = None
        super().__init__(groups, dict(options))
        self._inner = inner([self._shards_of(group) for group in self.param_groups], **options)
        self.defaults = self._inner.defaults
        self._starts.clear()  # a second copy of the weights
        self._pull_options()

    @property
    def inner(self) -> Optimizer:
        """The optimizer over the pieces."""
        assert self._inner is not None
        return self._inner

    @property
    def state(self) -> Any:
        """The inner optimizer's state, by piece (`shard_of`)."""
        return {} if self._inner is None else self._inner.state

    @state.setter
    def state(self, value: Any) -> None:
        """Ignore the state that torch's constructor sets."""

    @property
    def has_masters(self) -> bool:
        """Whether pieces are copies: in another dtype or on another device than the parameters."""
        return any(piece.copied for piece in self._pieces.values())

    def shard_of(self, parameter: Tensor) -> Tensor | None:
        """Return the piece of a parameter that is updated here; None for a foreign parameter."""
        piece = self._pieces.get(id(parameter))
        return None if piece is None else piece.shard

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; those that the plan did not cut are kept whole on every rank."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            self._pieces[id(parameter)] = make_piece(
                parameter,
                self._cuts.get(id(parameter)),
                self._starts.get(id(parameter)),
                self._device,
                self._master,
            )
        if self._inner is not None:
            self._inner.add_param_group(self._shards_of(group))
            self._pull_options()

    def _shards_of(self, group: dict[str, Any]) -> dict[str, Any]:
        return {**group, "params": [self._pieces[id(p)].shard for p in group["params"]]}

    def _push_options(self) -> None:
        """Give the inner optimizer our hyperparameters."""
        _copy_options(self.param_groups, self.inner.param_groups)

    def _pull_options(self) -> None:
        """Take the hyperparameters that the inner optimizer has set."""
        _copy_options(self.inner.param_groups, self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the pieces, then gather them into the parameters on all ranks.

        Args:
            closure: Computes the loss, which is returned, and the gradients; called once.

        Raises:
            MoeifyError: A gradient is sparse, a parameter was moved or cast, or the inner optimizer
                does not support DTensors.
            DispatchError: Another rank died, stalled or did not step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._push_options()
        for piece in self._pieces.values():
            piece.adopt()
            piece.shard.grad = piece.gradient()
        self._step_inner()
        for piece in self._pieces.values():
            piece.shard.grad = None
        self._pull_options()
        self.publish()
        return loss

    def _step_inner(self) -> None:
        try:
            self.inner.step()
        except RuntimeError as error:
            if not any(word in str(error) for word in ("placement", "DTensor")):
                raise
            raise MoeifyError(
                f"{type(self.inner).__name__} cannot update pieces of parameters: it uses an "
                "operation that torch's DTensor does not support; use another optimizer, or "
                f"`zero.stage: 0` ({error})"
            ) from error

    def adopt_writes(self) -> None:
        """Copy what was written into parameters since the last step into the master weights."""
        for piece in self._pieces.values():
            piece.adopt()

    @torch.no_grad()
    def publish(self) -> None:
        """Set the parameters to the pieces gathered from all ranks; collective."""
        for piece in self._pieces.values():
            if piece.copied and not piece.gathered:
                local_part(piece.parameter).copy_(local_part(piece.shard))
        for bucket in buckets(self._pieces.values()):
            gather(bucket)
        for piece in self._pieces.values():
            piece.version = compat.version(local_part(piece.parameter))

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict for the pieces of this rank.

        With `pieces`, where they begin and end, and `masters`, those that are copies. It loads in
        the same layout only; use `save_sharded` to change the layout.
        """
        state: dict[str, Any] = self.inner.state_dict()
        state["pieces"] = self._places()
        if self.has_masters:
            pieces = self._pieces.values()
            state["masters"] = [local_part(p.shard).detach() if p.copied else None for p in pieces]
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned on this rank of the same layout; collective.

        Master weights are copied into the parameters.

        Raises:
            CheckpointError: It is of another layout, or of an optimizer without master weights.
        """
        saved, current = state_dict.get("pieces"), self._places()
        if saved != current:
            raise CheckpointError(
                "this optimizer state is from another layout or another optimizer "
                f"({_difference(saved, current)}): load it on the ranks that saved it, or save it "
                "with save_sharded"
            )
        masters = state_dict.get("masters")
        if self.has_masters and masters is None:
            raise CheckpointError(
                "this optimizer state has no master weights, and this optimizer keeps them: it was "
                "saved under another `zero.precision` or `zero.offload`"
            )
        self.inner.load_state_dict(
            {key: state_dict[key] for key in ("state", "param_groups") if key in state_dict}
        )
        self._pull_options()
        for piece, value in zip(self._pieces.values(), masters or (), strict=False):
            if piece.copied:
                local_part(piece.shard).copy_(value)
        if self.has_masters:
            self.publish()

    def _places(self) -> list[tuple[int, ...]]:
        """Return (start, length, shape of the local piece) of each."""
        return [(p.start, p.length, *local_part(p.shard).shape) for p in self._pieces.values()]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise MoeifyError(
            "a ShardedOptimizer holds pieces of one model's parameters and cannot be copied or "
            "pickled: make another one with mf.optimizer(copy_of_the_model, ...) and load this "
            "one's state_dict() into it"
        )


def _copy_options(source: list[dict[str, Any]], target: list[dict[str, Any]]) -> None:
    for given, group in zip(source, target, strict=True):
        group.update({key: value for key, value in given.items() if key != "params"})


def _difference(saved: Any, current: Any) -> str:
    """Describe how the pieces of a saved state differ from the current ones."""
    if saved is None:
        return "it does not list its pieces"
    if len(saved) != len(current):
        return f"{len(saved)} parameters, here {len(current)}"
    place = next(i for i, (a, b) in enumerate(zip(saved, current, strict=True)) if a != b)
    return f"parameter {place}: start, length, shape {saved[place]}, here {current[place]}"


class Guard:
    """Makes optimizers other than `ShardedOptimizer` refuse these parameters.

    They would keep all states on every rank and device, and know nothing of master weights. Copied
    by `copy.deepcopy` or pickle together with the model, it guards the copies.
    """

    def __init__(self, places: Iterable[tuple[nn.Module, str]]) -> None:
        # Not the parameters, nor marks on them: torch swaps and replaces them (`model.to()`).
        self.places = tuple(places)
        _guards.add(self)
        if not _registered:
            _registered.append(register_optimizer_step_pre_hook(_refuse))

    @classmethod
    def of(cls, model: nn.Module) -> Guard:
        """Return the guard of all parameters of a model that train."""
        return cls(
            (module, leaf)
            for module in model.modules()
            for leaf, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.places,)

    def held(self) -> set[int]:
        """Return the ids of the parameters."""
        return {id(owner._parameters.get(leaf)) for owner, leaf in self.places}

    def remove(self) -> None:
        """Let other optimizers update the parameters."""
        _guards.discard(self)


_registered: list[Any] = []
_guards: weakref.WeakSet[Guard] = weakref.WeakSet()


def _refuse(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if isinstance(optimizer, ShardedOptimizer) or not _guards:
        return
    guarded = {key for guard in list(_guards) for key in guard.held()}
    if any(id(p) in guarded for group in optimizer.param_groups for p in group["params"]):
        name = type(optimizer).__name__
        raise MoeifyError(
            f"this {name} would step over whole parameters, and the plan (`zero:`) partitions, "
            "offloads or keeps master weights of what an optimizer holds: make it by "
            f"mf.optimizer(model, torch.optim.{name}, lr=...)"
        )
