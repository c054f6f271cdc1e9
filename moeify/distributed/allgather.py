"""The all-gather form of an exchange: every rank sees all tokens and runs its own experts on them.

Cheaper than an all-to-all where messages are small, as in decoding, or where each token goes to as
many experts as there are ranks.

Shapes: T tokens of this rank, M the most tokens of any rank, N ranks, D model width, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moeify.distributed.collectives import run
from moeify.kernels import check_counts as _check_counts  # noqa: F401  registers the op
from moeify.kernels import local_routes as _local_routes  # noqa: F401

__all__ = ["gather", "kept_ids", "most_tokens", "scatter_sum"]

_check: Any = torch._check  # both untyped in torch
_sym_max: Any = torch.sym_max


def most_tokens(
    tokens: Tensor,
    capacity: int | torch.SymInt,
    group: str,
    ranks: Sequence[int],
    rank: int,
    where: str,
) -> int:
    """Return M; with a capacity (not -1) it is T, and the host does not wait for the device.

    `ranks` are the N global ranks of the group.

    Raises:
        DispatchError: There is a capacity, and ranks hold different numbers of tokens.
    """
    count = tokens.shape[0]
    own = torch.full((1, 2), count, dtype=torch.int64, device=tokens.device)
    op = torch.ops._c10d_functional.all_gather_into_tensor
    token_counts = run(op, own, len(ranks), group, where=f"{where}: numbers of tokens")
    if isinstance(capacity, torch.SymInt) or capacity >= 0:
        torch.ops.moeify.check_counts(token_counts, count, where, ranks, rank)
        return count
    counts = torch.ops.moeify.check_counts(token_counts, -1, where, ranks, rank)
    values: list[int] = counts.flatten().tolist()
    most: int = values[0]
    for value in values[1:]:
        most = _sym_max(most, value) if torch.compiler.is_compiling() else max(most, value)
    _check(most >= count)
    return most


def gather(rows: Tensor, most: int, ranks: int, group: str, where: str) -> Tensor:
    """Return the rows [T, ...] of all ranks, [N * M, ...], padded with zeros per rank.

    Differentiable for floats: the gradient of a rank's rows is the sum over all ranks.
    """
    full = _padded(rows, most)
    op = torch.ops._c10d_functional.all_gather_into_tensor
    return run(op, full, ranks, group, where=where)


def scatter_sum(rows: Tensor, tokens: Tensor, ranks: int, group: str, where: str) -> Tensor:
    """Return this rank's rows [T, D] of the sum of all ranks' rows [N * M, D]; undoes `gather`."""
    op = torch.ops._c10d_functional.reduce_scatter_tensor
    own = run(op, rows.contiguous(), "sum", ranks, group, where=where)
    return own.narrow(0, 0, tokens.shape[0])


def kept_ids(ids: Tensor, slots: Tensor) -> Tensor:
    """Return the experts [T, K] int32 of the routes, counted from 1; 0 where dropped."""
    # From 1, because `gather` pads a shorter batch with zeros: these must be no expert either.
    return torch.where(slots >= 0, ids, -1) + 1


def _padded(rows: Tensor, most: int) -> Tensor:
    missing = most - rows.shape[0]
    if not torch.compiler.is_compiling() and missing == 0:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
