"""Router losses over the tokens of all ranks.

The balance loss is a product of two means over tokens, so the mean of the ranks' losses is not the
loss of all their tokens: the sums are reduced instead, in one small all-reduce per layer. Every
rank then has the same loss; averaging gradients over the ranks counts it once.

Shapes: T tokens of this rank, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeify.distributed.collectives import sum_over_ranks
from moeify.kernels.gate import count_choices, expert_scores, normalized_scores
from moeify.kernels.precision import without_autocast
from moeify.kernels.route import Routing


def over_ranks(
    routing: Routing, group: str, where: str, top_k: int, score: str, balance: str
) -> tuple[Routing, Tensor]:
    """Return a routing with losses, counts and statistics over the ranks of a group.

    The formulas are those of `kernels.gate`, with means over the tokens of all ranks. Also returned
    is their number, an int64 scalar.
    """
    logits, experts = routing.logits, routing.logits.shape[1]
    with without_autocast(logits):
        share = normalized_scores(expert_scores(logits, score), score)
        counts = routing.counts
        counted = counts if balance == "all" else count_choices(routing.ids[:, :1], experts)
        own = logits.new_full((1,), logits.shape[0], dtype=torch.float64)
        parts = [
            share.sum(0),
            logits.logsumexp(1).square().sum().view(1),
            routing.entropy.view(1) * own,
            routing.dropped.view(1),
            counts,
            counted,
            own,
        ]
        # Float64 counts exactly, and is a few kilobytes.
        packed = torch.cat([part.to(torch.float64) for part in parts])
        total = sum_over_ranks(packed, group, f"{where}: router losses")
        sizes = [experts, 1, 1, 1, experts, experts, 1]
        probability, square, entropy, dropped, counts, counted, tokens = torch.split(total, sizes)
        some = tokens.detach().clamp_min(1)
        each = top_k if balance == "all" else 1
        aux = (probability / some * counted.detach() / some).sum() * (experts / each)
        found = routing._replace(
            aux_loss=aux.to(routing.aux_loss.dtype),
            z_loss=(square / some).sum().to(routing.z_loss.dtype),
            entropy=(entropy.detach() / some).sum().to(routing.entropy.dtype),
            dropped=dropped.detach().sum().to(routing.dropped.dtype),
            counts=counts.detach().to(routing.counts.dtype),
        )
    return found, tokens.detach().sum().to(torch.int64)
