from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moeify.kernels.assign import assign_reference
from moeify.kernels.triton import assign

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def chosen(tokens, experts, top_k):
    """Distinct experts per token, some of them far more popular than others."""
    scores = torch.rand(tokens, experts) + 2 * torch.rand(experts)
    return scores.topk(top_k).indices.int().to(DEVICE)


def priorities(kind, tokens, top_k):
    if kind == "position":
        return None
    if kind == "token":  # the same for all choices of a token, with many ties
        return torch.rand(tokens, 1).mul(4).round().expand(tokens, top_k).to(DEVICE)
    found = torch.rand(tokens, top_k) - 0.5
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0])[:tokens]
    found[: len(special), 0] = special
    return found.to(DEVICE)


def check(ids, priority, experts, capacity):
    got = assign.assign(ids, priority, experts, capacity)
    expected = assign_reference(ids, priority, experts, capacity)
    for actual, desired in zip(got, expected, strict=True):
        assert actual.dtype == desired.dtype
        assert torch.equal(actual, desired)


@pytest.mark.parametrize("many", [False, True], ids=["one program", "blocks"])
@pytest.mark.parametrize("kind", ["position", "token", "score"])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(0, 4, 2), (1, 3, 3), (9, 4, 2), (50, 1, 1), (97, 15, 4), (300, 600, 3)],
)
@pytest.mark.thin(5)  # coprime to six: sizes, kinds and programs all take part
def test_equals_the_reference(monkeypatch, tokens, experts, top_k, kind, many):
    if many:
        monkeypatch.setattr(assign, "SMALL", 0)
    ids, priority = chosen(tokens, experts, top_k), priorities(kind, tokens, top_k)
    for capacity in {0, 1, max(1, tokens * top_k // experts), max(tokens - 1, 0), tokens}:
        check(ids, priority, experts, capacity)


@pytest.mark.parametrize("kind", ["position", "score"])
@pytest.mark.parametrize("capacity", [2500, 9000])
@pytest.mark.thin(3)  # both kinds and both capacities, once
def test_more_blocks_than_one_program_scans(kind, capacity):
    check(chosen(9000, 5, 2), priorities(kind, 9000, 2), 5, capacity)


def test_all_to_one_expert_over_capacity():
    check(torch.full((700, 1), 3, dtype=torch.int32, device=DEVICE), None, 6, 40)
    check(torch.full((1500, 1), 3, dtype=torch.int32, device=DEVICE), None, 6, 40)


def test_transposed_ids():
    check(chosen(60, 8, 3).t().contiguous().t(), None, 8, 10)


def test_counts_of_first_choices():
    ids = chosen(400, 6, 3)
    before, totals = assign.count(ids, 6, choices=1)
    assert totals[:6].tolist() == ids[:, 0].bincount(minlength=6).tolist()
    assert before[0].tolist() == [0] * before.shape[1]
    assert (
        before[-1, :6].tolist() == ids[: 128 * (len(before) - 1), 0].bincount(minlength=6).tolist()
    )


def test_what_is_not_served_is_left_to_the_reference():
    ids = chosen(4, 3, 2)
    assert assign.assign(ids, torch.rand(4, 2).double(), 3, 1) is NotImplemented
    assert assign.assign(ids, None, 1024, 1) is NotImplemented
    assert assign.assign(ids.long(), None, 3, 1) is NotImplemented
