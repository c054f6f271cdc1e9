"""Put finished blocks into a model, all or nothing.

An installation is a transaction: its steps change the model one after the other, each on all ranks
before the next one starts. After any error, in any step and on any rank, the model is exactly the
dense one again.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack

from torch import nn

from moeify import compat
from moeify.capture.capture import ExampleInputs
from moeify.capture.input_spec import describe_inputs
from moeify.convert.pipeline import Built
from moeify.convert.verify import Snapshot, check, check_untouched, coarsest, compare, snapshot
from moeify.convert.world import Parallel, reduce_gradients, sharded_names
from moeify.distributed.agreement import run_on_all_ranks
from moeify.distributed.mesh import World
from moeify.passes.rewrite.blocks import replaced_parameters
from moeify.plan.layer_plan import ResolvedPlan
from moeify.plan.plan import Plan
from moeify.sites.discovery import Discovery, block_path, find_site
from moeify.sites.install import Installer, make_ledger, skeleton
from moeify.sites.record import ATTRIBUTE, Conversion, ConvertedLayer, Fate
from moeify.tensor_parallel.apply import apply
from moeify.train import losses
from moeify.zero.apply import Partitioned, partition

log = logging.getLogger("moeify")


class Installation:
    """The transaction that turns a dense model into a converted one.

    `run` takes the steps in their order: `install`, `slice_dense`, `verify`, `partition`, and then
    `commit`; after an error `roll_back`. A model on meta is never compared, whatever `verify` says.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        resolved: ResolvedPlan,
        discovery: Discovery,
        built: Built,
        example_inputs: ExampleInputs,
        *,
        verify: bool = True,
        world: World | None = None,
    ) -> None:
        self.model, self.plan, self.resolved = model, plan, resolved
        self.discovery, self.built, self.world = discovery, built, world
        self.example_inputs = example_inputs
        self._before = dict(model.named_parameters(remove_duplicate=False))
        self._versions = {name: (id(p), p._version) for name, p in self._before.items()}
        replaced = replaced_parameters(resolved)
        self._untouched = [name for name in self._before if name not in replaced]
        self._compares = verify and not any(p.is_meta for p in self._before.values())
        self._installer = Installer(model)
        self._undo = ExitStack()
        self._undo.callback(self._installer.undo)
        self._layers: list[ConvertedLayer] = []
        self._dense: Snapshot | None = None
        self._ledger: dict[str, tuple[Fate, str]] = {}
        self._partitioned = Partitioned()

    def run(self) -> None:
        """Take all steps, or leave the model as it was."""
        try:
            # One after the other on all ranks: blocks that run wait for those of other ranks.
            run_on_all_ranks("install its blocks", self.install)
            run_on_all_ranks("slice its dense layers", self.slice_dense)
            run_on_all_ranks("prove its blocks", self.verify)
            run_on_all_ranks("partition its state", self.partition)
            record = self._record()
        except BaseException:
            self.roll_back()
            raise
        self.commit(record)

    def install(self) -> None:
        """Put the blocks where the dense MLPs stand."""
        if self._compares:
            self._dense = snapshot(self.model, self.example_inputs, self._untouched)
        for layer in self.resolved:
            found = find_site(self.discovery, layer)
            path = block_path(found, layer)
            swaps = self._installer.install(found, path, self.built.blocks[layer.name])
            converted = ConvertedLayer(layer, path, swaps)
            if found is not None:
                program = found.region.program
                converted = ConvertedLayer(layer, path, swaps, program.swap, program.params)
            self._layers.append(converted)

    def slice_dense(self) -> None:
        """Account for every dense parameter, then slice dense layers over the tensor ranks."""
        self._ledger = make_ledger(self._before, self.model, self._layers)
        check_untouched(self._versions, self.model)
        if self.built.slices is not None and self.world is not None:
            sliced = apply(self.model, self.built.slices, self.world.dense["tp"])
            self._undo.callback(sliced.undo)

    def verify(self) -> None:
        """Compare with what the dense model gave, then drop the weights that were replaced."""
        if self._dense is not None:
            now = snapshot(self.model, self.example_inputs, self._untouched)
            difference = compare(self._dense, now, self.resolved.layers)
            log.info("step-0 difference: %s", difference)
            check(difference, coarsest(p.dtype for p in self._before.values()))
            self._dense = None  # gradients, as large as their parameters
        for converted in self._layers:
            for swap in converted.swaps:
                swap.original = skeleton(swap.original)

    def partition(self) -> None:
        """Partition the state over the ranks, where the plan asks for it."""
        if self.world is None or not self.plan.zero.is_active:
            return
        if self.built.zero is None:
            log.warning("partition-zero is disabled: nothing is partitioned")
            return
        self._partitioned = partition(
            self.model,
            self.built.zero,
            self.world,
            self.resolved,
            self._block_paths(),
            self.built.slices,
            self._undo,
        )

    def commit(self, record: Conversion) -> None:
        """Leave the record on the model; from here on nothing is rolled back."""
        self._undo.pop_all()
        self.model.__dict__[ATTRIBUTE] = record
        losses.attach(self.model)

    def roll_back(self) -> None:
        """Make the model the dense one again: undo the steps, the last one first."""
        self._undo.close()

    def _block_paths(self) -> dict[str, str]:
        return {converted.layer.name: converted.block for converted in self._layers}

    def _record(self) -> Conversion:
        """Return the record of the conversion; on several ranks hook up their gradients too."""
        return Conversion(
            self.plan,
            self._layers,
            self._ledger,
            self._installer.fused,
            describe_inputs(self.example_inputs),
            None if self.world is None else self._parallel(self.world),
        )

    def _parallel(self, world: World) -> Parallel:
        """Hook the reduction of gradients in, and return what is recorded of the ranks."""
        zero = self.built.zero
        # From stage 2 on parameters are pieces, whose engine reduces gradients itself.
        in_pieces = zero is not None and zero.stage >= 2
        which = "none" if in_pieces else self.plan.parallel.gradients
        reducer = reduce_gradients(self.model, world, self.resolved, self._block_paths(), which)
        if reducer is not None:
            self._undo.callback(reducer.remove)
        compat.leave_out_of_ddp(self.model, sharded_names(self.model))
        return Parallel(
            layout=world.layout,
            rank=world.rank,
            reducer=reducer,
            slices=self.built.slices,
            zero=zero,
            cuts=self._partitioned.cuts,
            masters=self._partitioned.masters,
            guard=self._partitioned.guard,
        )
