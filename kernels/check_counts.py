"""`moeify::check_counts`: the send counts of the other ranks, checked before any row is sent.

Collectives with splits that do not agree return garbage or hang. So each rank first sends every
other one the number of rows for each of its experts, and their sum (or, in an even layout, the
capacity); the receiver compares. On a GPU the check of an even layout runs on the device, without
the host.

Shapes: N ranks of the group, L local experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeify.errors import DispatchError
from moeify.kernels.registry import define, fake


def check_counts_reference(
    recv_counts: Tensor, capacity: int, where: str, ranks: Sequence[int], rank: int
) -> Tensor:
    """Return the rows that each rank of the group will send to each local expert.

    Args:
        recv_counts: [N, L + 1] int64, what each rank announced to this one: rows for each of its
            experts, then their sum, or the capacity in an even layout.
        capacity: Rows per expert in an even layout, or -1.
        where: The layer, for messages.
        ranks: [N] global ranks of the group.
        rank: This rank.

    Returns:
        [N, L] int64, equal to `recv_counts[:, :-1]`.

    Raises:
        DispatchError: The announcements do not agree.
    """
    counts = recv_counts[:, :-1]
    last = recv_counts[:, -1]
    if capacity < 0:
        fine = ((counts >= 0).all(1)) & (counts.sum(1) == last)
    else:
        fine = ((counts >= 0) & (counts <= capacity)).all(1) & (last == capacity)
    if capacity >= 0 and recv_counts.is_cuda:
        torch._assert_async(fine.all(), f"{where}: ranks announced different capacities")
        return counts.clone(memory_format=torch.contiguous_format)
    if not bool(fine.all()):
        place = int((~fine).nonzero()[0])
        counted = recv_counts[place].tolist()
        raise DispatchError(_message(counted, capacity, where, ranks[place], rank))
    return counts.clone(memory_format=torch.contiguous_format)


def _message(counted: list[int], capacity: int, where: str, sender: int, rank: int) -> str:
    counts, last = counted[:-1], counted[-1]
    head = f"{where}: rank {sender} announced to rank {rank}"
    if capacity < 0:
        return (
            f"{head} {counts} rows for its experts, which is {sum(counts)}, and a total of {last}: "
            "the ranks do not run the same code on the same plan"
        )
    if last == capacity:
        return f"{head} {counts} rows for its experts; each must be 0 to {capacity}, the capacity"
    return (
        f"{head} a capacity of {last} rows, but that of rank {rank} is {capacity}: the ranks hold "
        "different numbers of tokens; pad the batches to one size, or set "
        "`parallel: {splits: uneven}`"
    )


check_counts = define(
    "check_counts",
    "(Tensor recv_counts, SymInt capacity, str where, int[] ranks, int rank) -> Tensor",
    check_counts_reference,
)


@fake("check_counts")
def _(recv_counts: Tensor, capacity: int, where: str, ranks: Sequence[int], rank: int) -> Tensor:
    return recv_counts.new_empty(recv_counts.shape[0], recv_counts.shape[1] - 1)
