"""The parts of a plan beside its rules: routing, start, layout, partitioning. Without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from moeify.plan.selection import LISTED, Count, Natural, Strict

_Amount: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Factor: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Folder: TypeAlias = Annotated[str, Field(min_length=1)]


class RouterSpec(Strict):
    """How tokens find their experts.

    Attributes:
        score: Function from logits to scores, in float32.
        combine: Weight of an expert's output. `auto` is `straight_through` (value 1, gradient of
            the probability) for `top_k: 1`, `normalized` (over the kept routes) above, and with
            `init: {experts: split}` `sum` (value 1 each, gradient of the probability).
        noise: What is added in training: `jitter` on the router's input, `rsample` Gumbel noise on
            the choice (`top_k: 1`), `gumbel` sampling of the second expert (`top_k: 2`).
        jitter_eps: Half width of the jitter around 1.
        capacity_factor: Rows per expert in training, relative to an even load; null drops nothing.
        eval_capacity_factor: The same in evaluation.
        min_capacity: Fewest rows per expert.
        drop: Which rows are dropped when an expert is full: `random` ones, those at a later
            `position`, or those with a lower `score`.
        balance: Balance loss over `all` choices or the `first` only.
        aux_loss: Weight of the balance loss.
        z_loss: Weight of the squared log-partition of the logits.
        bias_update: Step of the bias that balances without a loss; 0 for none.
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    combine: Literal["auto", "straight_through", "probability", "normalized", "sum"] = "auto"
    noise: Literal["none", "jitter", "rsample", "gumbel"] = "none"
    jitter_eps: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.01
    capacity_factor: _Factor | None = 1.25
    eval_capacity_factor: _Factor | None = None
    min_capacity: Natural = 4
    drop: Literal["random", "position", "score"] = "random"
    balance: Literal["all", "first"] = "all"
    aux_loss: _Amount = 0.01
    z_loss: _Amount = 0.0
    bias_update: _Amount = 0.0


class InitSpec(Strict):
    """Where experts and routers start.

    Attributes:
        experts: `copy` of the dense MLP; copies with `noise`; with neurons re-drawn (`drop`);
            `random`; slices of copies (`granular`); the hidden neurons divided among the experts
            (`split`); or the MLPs of several checkpoints (`models`).
        router: `normal`; `zeros`; rows that score what activates a split's `clusters`; or made
            from the MLP's inputs on the example inputs, grouped by similarity (`hidden`) or by
            their position in the batch (`prompts`).
        router_std: Standard deviation of a normal router.
        seed: Seed of everything that is drawn.
        noise_std: Standard deviation of `noise`, relative to each weight's own.
        drop_ratio: Share of the hidden neurons that `drop` re-draws.
        granularity: Slices per copy, with `granular`.
        clusters: Which neurons `split` keeps together: those with similar `weights`, those that are
            active on the same tokens (`coactivation`, on the example inputs), `random` ones, or
            neighbours (`slices`).
        from_: Folders of checkpoints of the same architecture (`from` in a plan), with `models`;
            relative ones start at the plan file's folder. Expert i is the i-th one's MLP.
        rest: What `models` does with all other parameters: their `average`, or `keep` the model's.
    """

    experts: Literal["copy", "noise", "drop", "random", "granular", "split", "models"] = "copy"
    router: Literal["normal", "zeros", "clusters", "hidden", "prompts"] = "normal"
    router_std: _Amount = 0.02
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    noise_std: _Amount = 0.01
    drop_ratio: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.5
    granularity: Count = 1
    clusters: Literal["weights", "coactivation", "random", "slices"] = "weights"
    from_: Annotated[tuple[_Folder, ...], LISTED] = Field(default=(), alias="from")
    rest: Literal["average", "keep"] = "average"

    @property
    def needs_activations(self) -> bool:
        """Whether the dense model must run on the example inputs for it."""
        clustered = self.experts == "split" and self.clusters == "coactivation"
        return clustered or self.router in ("hidden", "prompts")


def _word_or_bool(value: Any) -> str:
    return "<bool>" if isinstance(value, bool) else "<word>"


class ParallelSpec(Strict):
    """How the model is laid out on the ranks.

    Attributes:
        expert: Ranks that share the experts of a layer.
        tensor: Ranks that share each dense layer.
        experts_in_tp: Experts in a tensor group: `replicate`, `slice`, or `fold` (each rank has
            different ones).
        all_to_all: How rows are exchanged: directly between ranks (`flat`), through one rank per
            node (`hierarchical`), or all tokens to all ranks (`allgather`); `auto` by size and
            topology, for as many tokens as the example inputs have, at least 2,048.
        coordinated: Ranks of a tensor group hold the same tokens; each sends only its share of
            them. `auto` always does.
        splits: `auto` sends every expert its full capacity where there is one, so that nothing
            waits for the routing (ranks must then hold equally many tokens); `uneven` always
            sends only the rows that there are.
        overlap_chunks: In how many chunks rows are exchanged, so that the exchange of one overlaps
            the experts of another.
        gradients: Which gradients are reduced over the ranks in the backward pass: `all`; those of
            the `experts` and of slices, if DDP or another engine reduces the others; `none`.
    """

    expert: Count = 1
    tensor: Count = 1
    experts_in_tp: Literal["replicate", "slice", "fold"] = "replicate"
    all_to_all: Literal["auto", "flat", "hierarchical", "allgather"] = "auto"
    coordinated: Annotated[
        Annotated[bool, Tag("<bool>")] | Annotated[Literal["auto"], Tag("<word>")],
        Discriminator(_word_or_bool),
    ] = "auto"
    splits: Literal["auto", "uneven"] = "auto"
    overlap_chunks: Count = 1
    gradients: Literal["all", "experts", "none"] = "all"


class ZeroSpec(Strict):
    """What is partitioned over the data-parallel ranks; experts over the ranks that replicate them.

    Attributes:
        stage: 1: optimizer states; 2: and gradients; 3: and parameters.
        engine: `fsdp2`, torch's own; or `graph`: gathers are nodes of the blocks' graphs, so that a
            whole model compiles in one piece (stages 2 and 3).
        offload: What lives in CPU memory: the `optimizer` (master weights and states), the
            `parameters` (and their optimizer state, at stage 3), or `all`.
        precision: Dtype in which parameters are gathered and used; `model` keeps their own.
        master: Dtype that the optimizer updates, with another precision: `float32`, or the `same`
            as it computes in (DeepSpeed's `fp16_master_weights_and_grads`).
        reduce: Dtype in which gradients are reduced, with another precision.
        prefetch: How many units ahead parameters are gathered.
    """

    stage: Annotated[int, Field(ge=0, le=3)] = 0
    engine: Literal["fsdp2", "graph"] = "fsdp2"
    offload: Literal["none", "optimizer", "parameters", "all"] = "none"
    precision: Literal["model", "bf16", "fp16"] = "model"
    master: Literal["float32", "same"] = "float32"
    reduce: Literal["float32", "same"] = "float32"
    prefetch: Natural = 1

    @property
    def is_active(self) -> bool:
        """Whether it asks for anything."""
        return self.stage > 0 or self.offload != "none" or self.precision != "model"
