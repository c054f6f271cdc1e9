"""Layouts of an all-to-all, counts, local routes: bijections, and exchanges in one process."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from moeify.distributed import allgather, exchange
from moeify.errors import DispatchError
from moeify.kernels import (
    check_counts,  # noqa: F401  registers the ops
    local_routes,  # noqa: F401  registers the ops
)
from moeify.kernels.all_to_all_layout import part_capacity, part_rows
from moeify.kernels.combine import combine
from moeify.kernels.dispatch import dispatch

ops = torch.ops.moeify
WIDTH = 3


@dataclass
class Sender:
    """One rank's tokens and where they go; slots and offsets as `assign` gives them."""

    ids: Tensor  # [T, K], -1 where dropped
    slots: Tensor
    offsets: Tensor
    tokens: Tensor
    weights: Tensor

    @classmethod
    def of(cls, routes: list[list[int]], top_k: int, experts: int) -> Sender:
        ids = torch.tensor(routes, dtype=torch.int32).view(-1, top_k)
        flat = ids.flatten().tolist()
        kept = sorted((i for i, e in enumerate(flat) if e >= 0), key=lambda i: (flat[i], i))
        slots = torch.full((len(flat),), -1, dtype=torch.int32)
        slots[kept] = torch.arange(len(kept), dtype=torch.int32)
        ends = [sum(0 <= e <= last for e in flat) for last in range(experts)]
        offsets = torch.tensor(ends, dtype=torch.int32)
        # Small integers: sums are exact in any order.
        tokens = torch.randint(-99, 99, (len(ids), WIDTH)).float()
        weights = torch.randint(1, 9, ids.shape).float()
        return cls(ids, slots.view(ids.shape), offsets, tokens, weights)

    @property
    def most(self) -> int:
        counts = torch.diff(self.offsets, prepend=self.offsets.new_zeros(1))
        return int(counts.max())

    def wanted(self, scales: Tensor) -> Tensor:
        gate = self.weights * torch.where(self.ids >= 0, scales[self.ids.clamp_min(0).long()], 0)
        return gate.sum(1, keepdim=True) * self.tokens


@st.composite
def routings(draw, ranks=1):
    """Return (senders, experts): any routes of any tokens, some dropped, to any experts."""
    experts = ranks * draw(st.integers(1, 3))
    top_k = draw(st.integers(1, experts))
    allowed = draw(st.lists(st.integers(0, experts - 1), min_size=1, unique=True))
    senders = []
    for _ in range(ranks):
        choice = st.permutations(range(experts)).map(
            lambda p: [e if e in allowed else -1 for e in p[:top_k]]
        )
        routes = draw(st.lists(choice, max_size=6))
        dropped = draw(st.sets(st.integers(0, 12)))
        flat = [-1 if i in dropped else e for i, e in enumerate(e for r in routes for e in r)]
        senders.append(Sender.of([flat], top_k, experts))
    return senders, experts


def capacity_of(senders: list[Sender], spare: int | None) -> int:
    """Return -1 for an uneven layout, or enough rows for each expert and some to spare."""
    return -1 if spare is None else max(sender.most for sender in senders) + spare


SPARE = st.one_of(st.none(), st.integers(0, 3))
PARTS = st.integers(1, 4)


@settings(max_examples=80)
@given(routings(), SPARE, PARTS)
def test_send_layout_gives_every_kept_route_one_row_in_its_part_and_expert(routing, spare, parts):
    (sender,), experts = routing
    capacity = capacity_of([sender], spare)
    order, slots, counts = ops.send_layout(sender.slots, sender.offsets, capacity, parts)
    each = part_rows(sender.slots.numel(), experts, capacity, parts)
    assert order.shape == (each * parts,)
    assert order.dtype == slots.dtype == torch.int32
    assert torch.equal(slots >= 0, sender.slots >= 0)
    for route, row in enumerate(slots.flatten().tolist()):
        assert row < 0 or order[row] == route
    assert int((order >= 0).sum()) == int((slots >= 0).sum()) == int(counts.sum())
    flat = sender.ids.flatten()
    for part in range(parts):
        if capacity < 0:  # no gaps: an expert begins where the one before it ends
            begin = part * each + counts[part].cumsum(0) - counts[part]
        else:
            assert int(counts[part].max()) <= part_capacity(capacity, parts)
            begin = part * each + torch.arange(experts) * part_capacity(capacity, parts)
        for expert in range(experts):
            first, used = int(begin[expert]), int(counts[part, expert])
            routes = order[first : first + used].long()
            assert (routes >= 0).all()
            assert (flat[routes] == expert).all()
            packed = sender.slots.flatten()[routes]
            assert torch.equal(packed, packed.sort().values)
    shares = counts.max(0).values - counts.min(0).values
    assert int(shares.max()) <= 1  # every part holds an equal share of every expert


@settings(max_examples=60)
@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.one_of(st.none(), st.integers(0, 3)))
def test_receive_layout_sorts_segments_by_expert_and_source(data, sources, experts, capacity):
    most = 3 if capacity is None else capacity
    draw = st.lists(st.integers(0, most), min_size=experts, max_size=experts)
    counts = torch.tensor([data.draw(draw) for _ in range(sources)])
    even = capacity is not None
    rows = sources * experts * most if even else int(counts.sum())
    order, slots, offsets = ops.receive_layout(counts, rows, most if even else -1)
    assert order.shape == (rows,)
    assert slots.shape == (rows, 1)
    want, begin = {}, 0  # by (expert, source, place): the received row
    for source in range(sources):
        for expert in range(experts):
            used = int(counts[source, expert])
            want |= {(expert, source, i): begin + i for i in range(used)}
            begin += most if even else used
    sorted_rows = [want[key] for key in sorted(want)]
    assert order.tolist() == sorted_rows + [-1] * (rows - len(sorted_rows))
    assert offsets.tolist() == counts.sum(0).cumsum(0).tolist()
    for place, row in enumerate(sorted_rows):
        assert int(slots[row]) == place
    assert int((slots >= 0).sum()) == len(sorted_rows)


def scaled(rows: Tensor, offsets: Tensor, scales: Tensor) -> Tensor:
    """Experts that each multiply by another number; rows after the last one hold anything."""
    ends = offsets.long()
    lengths = torch.diff(ends, prepend=ends.new_zeros(1))
    used = int(ends[-1])
    hidden = torch.full_like(rows, torch.nan)
    hidden[:used] = rows[:used] * scales.repeat_interleave(lengths)[:, None]
    return hidden


def swap(boxes: list[list[Tensor]]) -> list[Tensor]:
    """What an all-to-all does: boxes by [from][to] in, one tensor for each receiver out."""
    return [torch.cat([sender[to] for sender in boxes]) for to in range(len(boxes))]


def exchanged(senders: list[Sender], scales: Tensor, capacity: int, parts: int) -> list[Tensor]:
    """Return each rank's output of a whole exchange, parts one after another."""
    ranks, experts = len(senders), scales.shape[0]
    local, each = experts // ranks, part_capacity(capacity, parts)
    layouts = [ops.send_layout(s.slots, s.offsets, capacity, parts) for s in senders]
    rows = [dispatch(s.tokens, *w[:2]).chunk(parts) for s, w in zip(senders, layouts, strict=True)]
    rows = [r if len(r) == parts else [r[0]] * parts for r in rows]  # nothing, cut in parts
    returned: list[list[Tensor]] = [[] for _ in senders]
    for part in range(parts):
        send_counts = [exchange.send_counts(layout[2][part], each, ranks) for layout in layouts]
        recv_counts = swap([list(s.split(1)) for s in send_counts])
        names = list(range(ranks))
        counts = [ops.check_counts(h, each, "layer", names, r) for r, h in enumerate(recv_counts)]
        splits = [exchange.splits(s, c, each) for s, c in zip(send_counts, counts, strict=True)]
        for rank, (_, receive) in enumerate(splits):
            assert receive == [splits[other][0][rank] for other in names]
        send_rows = [exchange.cut(rows[r][part], splits[r][0]).split(splits[r][0]) for r in names]
        recv_rows = swap([list(boxes) for boxes in send_rows])
        results = []
        for rank in names:
            order, slots, ends = ops.receive_layout(counts[rank], recv_rows[rank].shape[0], each)
            own = scales[rank * local : (rank + 1) * local]
            hidden = scaled(dispatch(recv_rows[rank], order, slots), ends, own)
            results.append(list(combine(hidden, None, order, slots).split(splits[rank][1])))
        for rank, came in enumerate(swap(results)):
            returned[rank].append(exchange.padded(came, rows[rank][part]))
    return [
        combine(torch.cat(r), s.weights, *w[:2])
        for r, s, w in zip(returned, senders, layouts, strict=True)
    ]


@settings(max_examples=80)
@given(st.data(), st.integers(1, 4), SPARE, PARTS)
def test_an_exchange_gives_each_token_its_weighted_experts(data, ranks, spare, parts):
    senders, experts = data.draw(routings(ranks))
    scales = torch.arange(1, experts + 1).float()
    capacity = capacity_of(senders, spare)
    for sender, y in zip(senders, exchanged(senders, scales, capacity, parts), strict=True):
        assert torch.equal(y, sender.wanted(scales))


@settings(max_examples=60)
@given(st.data(), st.integers(1, 4))
def test_a_gathering_gives_each_token_its_weighted_experts(data, ranks):
    senders, experts = data.draw(routings(ranks))
    scales, local = torch.arange(1, experts + 1).float(), experts // ranks
    most = max(len(s.tokens) for s in senders)

    def everyone(parts: list[Tensor]) -> Tensor:
        return torch.cat([allgather._padded(part, most) for part in parts])

    tokens, weights = everyone([s.tokens for s in senders]), everyone([s.weights for s in senders])
    routes = everyone([allgather.kept_ids(s.ids, s.slots) for s in senders])
    total = torch.zeros_like(tokens)
    seen = torch.zeros_like(routes)
    for rank in range(ranks):
        slots, order, offsets = ops.local_routes(routes, rank * local + 1, local)
        assert torch.equal(slots >= 0, (routes > rank * local) & (routes <= (rank + 1) * local))
        for route, row in enumerate(slots.flatten().tolist()):
            assert row < 0 or order[row] == route
        assert int((order >= 0).sum()) == int(offsets[-1]) == int((slots >= 0).sum())
        seen += slots >= 0
        own = scales[rank * local : (rank + 1) * local]
        hidden = scaled(dispatch(tokens, order, slots), offsets, own)
        total += combine(hidden, weights, order, slots)
    assert torch.equal(seen, (routes > 0).int())
    for rank, sender in enumerate(senders):
        y = total[rank * most :][: len(sender.tokens)]
        assert torch.equal(y, sender.wanted(scales))


EXAMPLES = [
    Sender.of([[0, 2], [2, -1], [-1, -1], [1, 2]], 2, 4),
    Sender.of([[-1], [-1]], 1, 3),
    Sender.of([], 2, 4),
]


def calls(sender: Sender, capacity: int, parts: int):
    """Yield (op, arguments) of a rank that exchanges with itself."""
    each = part_capacity(capacity, parts)
    yield "send_layout", (sender.slots, sender.offsets, capacity, parts)
    counts = ops.send_layout(sender.slots, sender.offsets, capacity, parts)[2][:1]
    rows = int(counts.sum()) if capacity < 0 else counts.numel() * each
    yield "receive_layout", (counts, rows, each)
    yield "check_counts", (exchange.send_counts(counts[0], each, 1), each, "layer", [0], 0)
    yield "local_routes", (sender.ids, 1, 2)


@pytest.mark.parametrize("sender", EXAMPLES, ids=["some", "dropped", "none"])
@pytest.mark.parametrize("capacity", [-1, 0, 3])
@pytest.mark.parametrize("parts", [1, 2])
def test_fake_results_look_like_real_ones(sender, capacity, parts):
    if 0 <= capacity < sender.most:
        capacity = sender.most
    for name, args in calls(sender, capacity, parts):
        op = getattr(ops, name)
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
        for one, other in pairs:
            assert (one.shape, one.dtype) == (other.shape, other.dtype), name
            assert one.stride() == other.stride(), name


@pytest.mark.parametrize("sender", EXAMPLES[::2], ids=["some", "none"])
@pytest.mark.parametrize("capacity", [-1, 3])
def test_opcheck(sender, capacity):
    for name, args in calls(sender, capacity, 2):
        opcheck(getattr(ops, name), args)


def announced(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("recv_counts", "capacity", "message"),
    [
        (
            announced([1, 2, 3], [1, 1, 3]),
            -1,
            r"rank 9 announced to rank 7 \[1, 1\] rows .* is 2, and a total of 3",
        ),
        (announced([-1, 4, 3], [1, 1, 2]), -1, r"rank 7 announced to rank 7 \[-1, 4\]"),
        (
            announced([1, 2, 4], [5, 0, 4]),
            4,
            r"rank 9 announced .* \[5, 0\] rows .* must be 0 to 4, the capacity",
        ),
        (announced([1, 2, 4], [1, -2, 4]), 4, r"rank 9 announced to rank 7 \[1, -2\] rows"),
        (
            announced([1, 2, 4], [1, 2, 6]),
            4,
            r"a capacity of 6 rows, but that of rank 7 is 4: .* pad .* uneven",
        ),
        (announced([1, 2, 4], [1, 2, 3]), 4, r"a capacity of 3 rows"),
        (announced([1, 2, 4], [1, 2, 3]), -1, r"h\.1\.mlp: rank 7 announced to rank 7"),
    ],
)
def test_counts_that_do_not_agree_raise(recv_counts, capacity, message):
    with pytest.raises(DispatchError, match=message):
        ops.check_counts(recv_counts, capacity, "h.1.mlp", [7, 9], 7)
