"""ZeRO by FSDP2: what it sends and gathers, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moeify as mf
from moeify.convert import install
from moeify.distributed.dtensor import is_sharded, whole
from moeify.errors import MoeifyError, UnsupportedModuleError
from moeify.simulate.counter import Call, count
from moeify.simulate.zero import with_pieces
from moeify.sites.record import conversion_of
from tests.distributed.ranks import run_ranks
from tests.distributed.test_experts_parallel import (
    WIDTH,
    Gated,
    Net,
    alone,
    batches,
    dense,
    mean_square,
    plan,
)

UNEVEN = (5, 0, 3, 4)


class Layer(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    """Three layers, and a head whose seven rows four ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        plain = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.layers = nn.ModuleList(Layer(mlp) for mlp in (plain, Gated(), Gated()))
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def stack() -> Stack:
    torch.manual_seed(3)
    return Stack()


def converted(made: dict[str, Any], net: nn.Module, *, verify: bool = True) -> Any:
    made, x = copy.deepcopy(made), torch.ones(4, WIDTH)
    return mf.moeify(net, made, example_inputs=x, verify=verify).train()


def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    return mean_square(model(x).float()) + mf.aux_loss(model)


def gap(got: torch.Tensor, want: torch.Tensor) -> float:
    far = (whole(got).detach() - want).abs()
    return float(far.max()) if far.numel() else 0.0


# What is sent, and what is gathered at once.

KINDS = ("all_gather", "reduce_scatter")
SLICES = {"expert": 1, "tensor": 2, "experts_in_tp": "slice"}
SENT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"expert": 2}, {"stage": 1}),
    ({"expert": 2}, {"stage": 2}),
    ({"expert": 2}, {"stage": 3}),
    ({"expert": 2}, {"stage": 3, "prefetch": 0}),
    ({"expert": 2}, {"stage": 3, "prefetch": 2, "precision": "bf16"}),
    ({"expert": 2}, {"stage": 3, "precision": "bf16", "reduce": "same"}),
    ({"expert": 4}, {"stage": 3}),  # experts that no other rank holds
    (SLICES, {"stage": 3}),  # biases without a free dimension
    (SLICES, {"stage": 1}),
    ({"expert": 2}, {"stage": 2, "engine": "graph"}),
    ({"expert": 2}, {"stage": 3, "engine": "graph"}),
]


def gathered_now(model: nn.Module) -> Counter[str]:
    """Count the bytes that FSDP2 holds of whole parameters, by kind."""
    sizes: Counter[str] = Counter()
    for name, module in model.named_modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        group = module._get_fsdp_state()._fsdp_param_group  # nobody else knows
        if group is None:
            continue
        held = [t for p in group.fsdp_params for t in p.all_gather_outputs]
        if group._all_gather_result is not None:
            held.append(group._all_gather_result.all_gather_output)
        kind = "expert" if name.endswith(".experts") else "dense"
        sizes[kind] += sum(t.untyped_storage().size() for t in held)
    return sizes


class Peak:
    """The most that was held at once when any of a model's innermost modules ran."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.most: Counter[str] = Counter()
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_full_backward_hook(self.see)
            if not list(module.children()):
                module.register_forward_hook(self.see)

    def see(self, *_: Any) -> None:
        self.most |= gathered_now(self.model)


def tally(calls: list[Call]) -> Counter[tuple[Any, ...]]:
    """Count gathers and reduce-scatters of more than one rank."""
    return Counter(
        (c.kind, c.ranks, c.payload) for c in calls if c.kind in KINDS and len(c.ranks) > 1
    )


def sent(rank: int) -> list[str]:
    """Compare a step of each case with its simulation; return what differs."""
    return [
        f"{parallel} {zero}: {line}"
        for parallel, zero in SENT
        for line in step(rank, plan(**parallel) | {"zero": zero})
    ]


def step(rank: int, made: dict[str, Any]) -> list[str]:
    model = converted(made, stack(), verify=False)
    record = conversion_of(model)
    decision, layout = record.parallel.zero, record.parallel.layout
    optimizer = mf.optimizer(model, torch.optim.SGD, lr=0.1)
    peak = Peak(model) if decision.engine == "fsdp2" else None
    left: Counter[str] = Counter()  # after the forward pass

    def run() -> None:
        loss = loss_of(model, torch.ones(4, WIDTH))
        left.update(gathered_now(model))
        loss.backward()
        optimizer.step()

    calls = count(run)
    if rank:
        return []  # a simulation is about rank 0
    experts = {f"{la.block}.experts": la.layer.experts for la in record.layers}
    ours = with_pieces([], decision, layout, experts)
    issued, forecast = tally(calls), tally(ours)
    wrong = []
    if decision.engine == "graph" and decision.stage == 3:
        # The backward pass reads no biases of projections.
        biases = [p for p in decision.parts.values() if "bias" in p.name and "norm" not in p.name]
        spared = forecast - issued
        if not spared or any(
            key[0] != "all_gather" or key[2] not in {p.cut() * p.itemsize for p in biases}
            for key in spared
        ):
            wrong.append(f"not only biases are forecast: {spared}")
        forecast -= spared
    if issued != forecast:
        wrong.append(f"issued {issued - forecast}, forecast {forecast - issued}")
    wrong += summed(decision, ours)
    if peak is None or decision.stage < 2:
        return wrong
    root = sum(part.padded * decision.computed(part) for part in decision.laid(decision.units[0]))
    for kind, memory in decision.memory().items():
        stays = memory.gathered if decision.stage == 2 else {"dense": root}.get(kind, 0)
        found = {"at most": (peak.most[kind], memory.gathered), "left": (left[kind], stays)}
        wrong += [f"{kind} {what} {a}, not {b}" for what, (a, b) in found.items() if a != b]
    return wrong


def summed(decision: Any, calls: list[Call]) -> list[str]:
    """Compare a list of calls with the plan's own sums."""
    want: Counter[str] = Counter()
    for row in decision.traffic().values():
        want.update(row)
    got: Counter[str] = Counter()
    for call in calls:
        if call.kind == "all_gather":
            got["gather"] += call.payload * len(call.ranks)
        else:
            got[call.kind] += call.payload
    if decision.stage < 2:  # whole gradients are reduced as ever
        want.pop("all_reduce")
    return [f"{key}: {got[key]} in calls, {n} in all" for key, n in want.items() if got[key] != n]


def test_what_is_sent_and_gathered():
    assert run_ranks(sent, 4) == [[]] * 4


# What it does to a model.


def trains(model: Any, x: torch.Tensor) -> bool:
    """Tell whether each parameter gets a gradient and a step changes it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    model(x).square().sum().backward()
    optimizer.step()
    return all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def hooks_of(model: nn.Module) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    state = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
    return sum(len(getattr(m, name)) for m in model.modules() for name in (*tables, *state))


def undone(rank: int, zero: dict[str, Any]) -> dict[str, Any]:
    """Fail on one rank, after the parameters have become pieces."""
    net = stack()
    seen: list[Any] = []
    net.head.register_forward_hook(lambda *_: seen.append(1))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    held = dict(net.named_parameters(remove_duplicate=False))
    classes = [type(module) for module in net.modules()]
    handed: dict[str, bool] = {}
    former = install.partition  # type: ignore[attr-defined]

    def fails(model: nn.Module, *args: Any) -> Any:
        made = former(model, *args)
        handed["sharded"] = any(is_sharded(p) for p in model.head.parameters())
        if rank == 1:
            raise MemoryError("on rank 1")
        return made

    install.partition = fails  # type: ignore[attr-defined]
    raised = ""
    try:
        converted(plan(expert=2) | {"zero": zero}, net)
    except (MemoryError, MoeifyError) as error:
        raised = f"{type(error).__name__}: {error}"
    finally:
        install.partition = former  # type: ignore[attr-defined]
    now = dict(net.named_parameters(remove_duplicate=False))
    results = {
        "raised": raised.split(":")[0] + (" of rank 1" if "on rank 1" in raised else ""),
        "was in pieces": handed["sharded"],
        "the same objects": now.keys() == held.keys() and all(now[n] is held[n] for n in held),
        "values": all(torch.equal(value, state[n]) for n, value in net.state_dict().items()),
        "classes": [type(module) for module in net.modules()] == classes,
        "hooks": hooks_of(net),
        "record": conversion_of(net) is None,
    }
    seen.clear()
    results["trains"] = trains(net, torch.randn(3, WIDTH))
    results["own hook"] = len(seen)
    made = converted(plan(expert=2) | {"zero": zero}, net)  # and it can be done again
    loss_of(made, torch.ones(3, WIDTH)).backward()
    results["again"] = all(p.grad is not None for p in made.parameters())
    return results


@pytest.mark.parametrize("zero", [{"stage": 3, "precision": "bf16"}, {"stage": 1}])
def test_a_conversion_that_fails_leaves_the_dense_model(zero):
    for rank, results in enumerate(run_ranks(undone, 2, zero)):
        assert results == {
            "raised": "MemoryError of rank 1" if rank else "MoeifyError of rank 1",
            "was in pieces": zero["stage"] == 3,
            "the same objects": True,
            "values": True,
            "classes": True,
            "hooks": 1,
            "record": True,
            "trains": True,
            "own hook": 1,
            "again": True,
        }


# What it computes.


def accumulated(rank: int, want: list[dict[str, Any]]) -> list[str]:
    """Two backward passes before a step, on unequal tokens; then changes that no pass sees."""
    wrong = []
    x = batches(UNEVEN)[rank]
    for stage in (2, 3):
        made = plan(expert=2) | {"zero": {"stage": stage}}
        model = converted(made, dense(), verify=False)
        for _ in range(2):
            loss_of(model, x).backward()
        for name, parameter in model.named_parameters():
            if (far := gap(parameter.grad, 2 * want[0]["gradients"][name])) > 2e-5:
                wrong.append(f"stage {stage}, twice, {name}: {far:.1e}")
        if not all(is_sharded(p) and is_sharded(p.grad) for p in model.parameters()):
            wrong.append(f"stage {stage}: something is whole")
        model.zero_grad()
        wrong += [f"stage {stage}, {line}" for line in changed(model, x)]
    return wrong


def changed(model: Any, x: torch.Tensor) -> list[str]:
    """Change pieces after a forward pass without gradients: the next one must see it."""
    wrong = []
    pieces = list(model.parameters())  # as an optimizer holds them
    with torch.no_grad():
        before = model(x)
        if stay := +gathered_now(model):
            wrong.append(f"no_grad: whole parameters stay: {stay}")
        if not torch.equal(model(x), before):
            wrong.append("a second pass differs")
        former = [p.detach().clone() for p in pieces]
        for parameter in pieces:
            parameter.mul_(0.5)
        after = model(x)
        if before.numel() and torch.equal(after, before):
            wrong.append("no_grad: the change is not seen")
    if gap(model(x), after) > 1e-6:
        wrong.append("with gradients: another output")
    with torch.no_grad():  # after a forward pass that no backward pass follows
        for parameter, value in zip(pieces, former, strict=True):
            parameter.copy_(value)
    if gap(model(x), before) > 1e-6:
        wrong.append("the values put back are not seen")
    model(x)  # keeps whole weights for a backward pass
    groups = mf.optimizer(model, torch.optim.SGD, lr=0.1).param_groups
    if not all(is_sharded(p) for group in groups for p in group["params"]):
        wrong.append("the optimizer holds whole weights")
    return wrong


def test_accumulated_gradients_and_changes_in_place():
    want = alone(plan(expert=2), UNEVEN, 1)
    assert run_ranks(accumulated, 4, want) == [[]] * 4


# What it refuses.


class Mixed(Net):
    """A layer norm in another dtype than the projections."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.LayerNorm(WIDTH).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.wide(x.double()).float())


class Scaled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


def message(error: type[Exception], action: Any) -> str:
    try:
        action()
    except error as caught:
        return str(caught)
    return "no error"


def refused(rank: int, folder: str) -> dict[str, str]:
    results = {}
    three = plan(expert=2) | {"zero": {"stage": 3}}
    for name, kind in (("mixed", Mixed), ("scalar", Scaled)):
        torch.manual_seed(0)
        net = kind()
        results[name] = message(UnsupportedModuleError, lambda n=net: converted(three, n))
        results[f"{name} is whole"] = str(not any(is_sharded(p) for p in net.parameters()))
    uniform = three | {"zero": {"stage": 3, "precision": "bf16"}}
    torch.manual_seed(0)
    results["one precision"] = message(UnsupportedModuleError, lambda: converted(uniform, Mixed()))
    x = torch.ones(3, WIDTH)
    for stage in (2, 3):
        alone = plan() | {"zero": {"stage": stage}}  # no expert or tensor ranks, just pieces
        model = converted(alone, dense(), verify=False)
        for name, action in {
            "demoeify": lambda m=model: mf.demoeify(m),
            "save": lambda m=model: mf.save(m, folder),
            "export": lambda m=model: mf.export(m, x),
        }.items():
            results[f"{name} {stage}"] = message(MoeifyError, action)
    model = converted(plan(expert=2) | {"zero": {"stage": 1}}, dense())
    plain = torch.optim.AdamW(model.parameters())
    loss_of(model, x).backward()
    before = [whole(p).detach().clone() for p in model.parameters()]
    results["plain optimizer"] = message(MoeifyError, plain.step)
    same = (torch.equal(whole(p), b) for p, b in zip(model.parameters(), before, strict=True))
    results["it did not step"] = str(all(same))
    return results


def test_refusals(tmp_path):
    for results in run_ranks(refused, 2, str(tmp_path / "save")):
        assert "norm.weight is torch.float32, wide.weight is torch.float64" in results.pop("mixed")
        assert results.pop("scalar").startswith("scale: FSDP2 does not take parameters without dim")
        for what in ("demoeify", "save", "export"):
            for stage in (2, 3):
                assert f"ZeRO stage {stage}" in results.pop(f"{what} {stage}")
        assert "make it by mf.optimizer" in results.pop("plain optimizer")
        assert results == {
            "mixed is whole": "True",
            "scalar is whole": "True",
            "one precision": "no error",
            "it did not step": "True",
        }
    assert not Path(tmp_path, "save").exists()
