"""One dense MLP split into experts: balanced groups of hidden neurons, each a slice of the MLP.

The slices of all experts add up to the MLP. Neurons that are active together are grouped, so that
few slices give most of the output: groups are balanced clusters of the neurons' weights, or of the
tokens on which they are active. The latter is a balanced partition of the graph of co-activations:
among groups of equal size, k-means on the columns of A keeps the most weight of A'A inside them.

Shapes: D model width, F hidden width, E experts, w = F / E, T tokens; `wide` is F, or 2F if gated.
"""

from __future__ import annotations

import hashlib
import importlib
from collections import OrderedDict
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from moeify.errors import MoeifyError
from moeify.init.strategies import MlpWeights, cut, generator_for
from moeify.plan.specs import InitSpec

ROUNDS = 30
"""Upper bound of the rounds of assigning and averaging."""

_FOUND: OrderedDict[str, Tensor] = OrderedDict()
"""The latest labels by a digest of their inputs, kept because experts are built one at a time."""


def neuron_groups(
    dense: MlpWeights, experts: int, spec: InitSpec, name: str, hidden: Tensor | None = None
) -> Tensor:
    """Return the hidden neurons of each expert, [E, w] int64, ascending, on the CPU (or `meta`).

    `hidden` [T, F] are the hidden values of some tokens, needed by `coactivation`. The site's name
    is part of the seed.

    Raises:
        MoeifyError: `coactivation` without hidden values, or scikit-learn is missing.

    Source:
        MoEfication (Zhang et al. 2022), section 3.2: "parameter clustering split" and
        "co-activation graph split".
    """
    width = dense.down.shape[1]
    if dense.up.is_meta:
        return torch.arange(width, device="meta").view(experts, -1)
    if spec.clusters == "slices" or experts == 1:
        return torch.arange(width).view(experts, -1)
    if spec.clusters == "random":
        generator = generator_for(spec.seed, name, "clusters")
        order = torch.randperm(width, generator=generator, device="cpu")
        return order.view(experts, -1).sort(1).values
    if spec.clusters == "coactivation":
        if hidden is None:
            raise MoeifyError(
                f"{name}: `clusters: coactivation` needs the whole model, to run it on the example "
                "inputs: convert it in memory, or use `clusters: weights`"
            )
        points = torch.nn.functional.normalize(active(hidden, experts).T, dim=1)
    else:
        halves = dense.up.detach().cpu().chunk(2) if dense.gated else (dense.up.detach().cpu(),)
        points = torch.cat([half.float() for half in halves], 1)
    labels = balanced_clusters(points, experts, spec.seed, name)
    return labels.argsort(stable=True).view(experts, -1)


def active(hidden: Tensor, experts: int) -> Tensor:
    """Return [T, F] float32: 1 for the 2F / E largest hidden values of a token, if not zero."""
    size = hidden.float().abs()
    count = max(1, min(size.shape[1], 2 * size.shape[1] // experts))
    smallest = size.topk(count, 1).values[:, -1:]
    return ((size >= smallest) & (size > 0)).float()


def split_experts(dense: MlpWeights, groups: Tensor, share: range, top_k: int) -> MlpWeights:
    """Return the slices of the experts in `share`, stacked, for groups [E, w] of neurons."""
    # A token adds the output bias of each of its experts, so each has a part of it.
    slices = cut(dense, groups[list(share)].to(dense.up.device))
    bias = slices.down_bias
    return replace(slices, down_bias=None if bias is None else bias / top_k)


def balanced_clusters(points: Tensor, groups: int, seed: int, name: str) -> Tensor:
    """Cluster points into groups of equal size.

    k-means in which every assignment keeps the sizes equal: greedy at first, then improved by
    exchanges between two groups until none helps, which comes within a percent of the optimal
    transport and takes N log N instead of cubic time. Points [N, d] are float32 on the CPU, N a
    multiple of `groups`; the labels are [N] int64. Seed and name seed the first centres.

    Raises:
        MoeifyError: scikit-learn is missing.

    Source:
        Balanced k-means: Malinen & Fränti 2014, as MoEfication uses it. First centres: k-means++
        (Arthur & Vassilvitskii 2007).
    """
    cluster = required("sklearn.cluster")
    key = hashlib.sha256(f"{groups} {seed} {name} {tuple(points.shape)}".encode())
    key.update(points.contiguous().numpy().data)
    if (known := _FOUND.get(key.hexdigest())) is not None:
        return known
    start = generator_for(seed, name, "clusters").initial_seed() % 2**32
    centres = torch.from_numpy(
        cluster.kmeans_plusplus(points.numpy(), groups, random_state=start)[0]
    )
    labels, lowest = torch.empty(0, dtype=torch.int64), float("inf")
    for _ in range(ROUNDS):
        costs = (centres.square().sum(1) - 2 * points @ centres.T).double()
        found = _assign(costs, labels)
        total = float(costs.gather(1, found[:, None]).sum())
        if not total < lowest - 1e-6 * abs(lowest) and len(labels):
            break
        labels, lowest = found, total
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        centres = sums / (len(points) // groups)
    _FOUND[key.hexdigest()] = labels
    if len(_FOUND) > 256:
        _FOUND.popitem(last=False)
    return labels


def _assign(costs: Tensor, labels: Tensor) -> Tensor:
    """Assign N points to E groups of N / E at low cost [N, E], starting from `labels` if any."""
    count, groups = costs.shape
    room = count // groups
    labels = labels.clone() if len(labels) else _greedy(costs, room)
    for _ in range(ROUNDS):
        if not _exchange(costs, labels):
            break
    return labels


def _greedy(costs: Tensor, room: int) -> Tensor:
    """Fill the groups, first with the points that would cost the most elsewhere."""
    count, groups = costs.shape
    labels = torch.full((count,), -1)
    left = [room] * groups
    costs = costs.clone()
    while (todo := (labels < 0).nonzero().flatten()).numel():
        best = costs[todo].topk(2, 1, largest=False)
        regret = best.values[:, 1] - best.values[:, 0]
        for group in range(groups):
            want = (best.indices[:, 0] == group).nonzero().flatten()
            first = want[regret[want].argsort(descending=True, stable=True)][: left[group]]
            labels[todo[first]] = group
            left[group] -= len(first)
        full = torch.tensor([free == 0 for free in left])
        costs[:, full] = torch.inf
        if int((~full).sum()) == 1:
            labels[labels < 0] = int((~full).nonzero())
    return labels


def _exchange(costs: Tensor, labels: Tensor) -> bool:
    """Exchange points between every two groups while the total cost falls; in place."""
    moved = False
    for a in range(costs.shape[1]):
        for b in range(a + 1, costs.shape[1]):
            inside = [(labels == group).nonzero().flatten() for group in (a, b)]
            gains = [
                (costs[points, old] - costs[points, new]).sort(descending=True, stable=True)
                for points, old, new in zip(inside, (a, b), (b, a), strict=True)
            ]
            count = int(((gains[0].values + gains[1].values) > 1e-9).sum())
            labels[inside[0][gains[0].indices[:count]]] = b
            labels[inside[1][gains[1].indices[:count]]] = a
            moved |= count > 0
    return moved


def required(module: str) -> ModuleType:
    """Import a module of scikit-learn, which is optional."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MoeifyError("clusters need scikit-learn: pip install 'moeify[split]'") from error
