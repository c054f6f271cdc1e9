"""Ranks that die, stall, lie or hold other numbers of tokens: the others say so, in time."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import moeify as mf
from moeify.distributed import exchange
from tests.distributed.ranks import run_ranks
from tests.distributed.test_experts_parallel import CAPACITY, WIDTH, dense, plan

TIMEOUT = 3.0
"""Seconds that a collective waits where a rank stalls."""

PATIENCE = 20.0
"""The same where nothing has to wait: errors come long before."""

STALL = 2 * TIMEOUT


def converted(**changes: Any) -> torch.nn.Module:
    model = mf.moeify(dense(), plan(**changes), example_inputs=torch.ones(4, WIDTH), verify=False)
    dist.barrier()  # one rank may be done while another still connects to it
    return model.train()


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stall(*_: Any) -> None:
    time.sleep(STALL)


def attempt(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[str, str, float]:
    """Run forward and backward; return the error's type and text, and how long it took."""
    start = time.monotonic()
    try:
        model(tokens).square().mean().backward()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "", "", time.monotonic() - start


def fails_at(rank: int, place: str, happens: Any, changes: dict[str, Any]) -> Any:
    """The last rank of two dies or stalls at a place of its pass."""
    model = converted(**changes)
    if rank == 1:
        if place == "forward":
            model.b.experts.register_forward_pre_hook(lambda *_: happens())
        elif place == "backward":
            model.b.register_full_backward_hook(lambda *_: happens())
        else:
            model.a.router.weight.register_hook(happens)  # the last that the reduction waits for
    return attempt(model, torch.randn(4, WIDTH))


PLACES = [
    ("forward", {"expert": 2}, r"b: tokens from experts: rank 0 could not exchange rows: "),
    ("forward", {"expert": 2, "all_to_all": "allgather"}, r"b: sums from experts: rank 0 could"),
    ("backward", {"expert": 2}, r"gradient of a: (router losses|tokens .* experts): rank 0 could"),
    ("end", {"expert": 2}, r"rank 0: gradient reduction of .* over 2 ranks failed\. Did a rank"),
]


@pytest.mark.parametrize(("place", "changes", "message"), PLACES)
def test_a_killed_rank_is_noticed_by_the_other(place, changes, message):
    answers = run_ranks(
        fails_at, 2, place, die, changes, timeout=PATIENCE, dies=(1,), deadline=30.0
    )
    kind, text, seconds = answers[0]
    assert kind == "DispatchError", text
    assert re.search(message, text), text
    assert seconds < PATIENCE / 2


@pytest.mark.parametrize(("place", "changes", "message"), [PLACES[2], PLACES[3]])
def test_a_stalled_rank_is_given_up_after_the_timeout_of_the_world(place, changes, message):
    answers = run_ranks(fails_at, 2, place, stall, changes, timeout=TIMEOUT, deadline=40.0)
    (kind, text, seconds), (other, _, _) = answers
    assert kind == other == "DispatchError"
    assert re.search(message, text), text
    assert 0.9 * TIMEOUT < seconds < STALL


def in_groups(rank: int) -> Any:
    """Rank 3 stalls in a group of two of four."""
    model = converted(expert=2).eval()
    if rank == 3:
        model.a.experts.register_forward_pre_hook(stall)
    with torch.no_grad():
        start = time.monotonic()
        try:
            model(torch.randn(4, WIDTH))
        except mf.DispatchError as error:
            return str(error), time.monotonic() - start
    return "", 0.0


def test_groups_within_the_world_have_its_timeout():
    fine, also, (text, seconds), (other, _) = run_ranks(
        in_groups, 4, timeout=TIMEOUT, deadline=40.0
    )
    assert fine[0] == also[0] == ""
    assert text.startswith("a: tokens from experts: rank 2 could not exchange rows: ")
    assert seconds < STALL
    assert other


def corrupted(rank: int, changes: dict[str, Any], kind: str) -> Any:
    """Rank 1 announces, in layer b, what is not so."""
    model = converted(**changes)

    def wrong(counts, capacity, ranks):
        announced = exchange.send_counts(counts, capacity, ranks).clone()
        if kind == "rows":
            announced[0, 0] += 1 + capacity if capacity >= 0 else 1
        elif kind == "negative":
            announced[0, 0] = -1
        else:
            announced[0, -1] += 1
        return announced

    if rank == 1:
        (node,) = model.b.graph.find_nodes(op="call_function", target=exchange.send_counts)
        node.target = wrong
        model.b.recompile()
    return attempt(model, torch.randn(4, WIDTH))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"splits": "uneven"}, "rows", r"rows for its experts, which is \d+, and a total of \d+"),
        ({"splits": "uneven"}, "last", r"rows for its experts, which is \d+, and a total of \d+"),
        (
            {"router": CAPACITY},
            "rows",
            r"its experts; each must be 0 to \d+, the capacity",
        ),
        ({"router": CAPACITY}, "negative", r" \[-1, .*\] rows for its experts; each must be 0 to"),
        ({"router": CAPACITY}, "last", r" a capacity of \d+ rows, but that of rank 0 is \d+"),
    ],
)
def test_impossible_counts_are_refused(changes, kind, message):
    answers = run_ranks(
        corrupted, 2, {"expert": 2, **changes}, kind, timeout=PATIENCE, deadline=30.0
    )
    (name, text, seconds), (other, _, _) = answers
    assert name == "DispatchError"
    assert other  # the liar sends what it does not have, or waits for rank 0
    assert text.startswith("b: rank 1 announced to rank 0 "), text
    assert re.search(message, text), text
    assert seconds < PATIENCE / 2


def unequal(rank: int, changes: dict[str, Any]) -> Any:
    model = converted(expert=2, router=CAPACITY, top_k=1, **changes)
    return attempt(model, torch.randn(16 if rank else 40, WIDTH))


@pytest.mark.parametrize("form", ["flat", "allgather"])
def test_unequal_tokens_under_a_capacity_are_refused(form):
    answers = run_ranks(unequal, 2, {"all_to_all": form}, timeout=PATIENCE, deadline=30.0)
    for kind, text, _ in answers:
        assert kind == "DispatchError"
        assert re.match(r"a: rank (1 announced to rank 0|0 announced to rank 1) ", text), text
        assert "numbers of tokens" in text
        assert "pad the batches" in text
        assert "splits: uneven" in text
    fine = run_ranks(unequal, 2, {"all_to_all": form, "splits": "uneven"}, deadline=30.0)
    assert [kind for kind, _, _ in fine] == ["", ""]
