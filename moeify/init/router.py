"""Router rows that know what they look for: from clusters of neurons, or from what MLPs read.

Shapes: T tokens, D model width, F hidden width, E experts, w = F / E.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.errors import MoeifyError
from moeify.init.calibration import Calibration
from moeify.init.split import balanced_clusters
from moeify.init.strategies import MlpWeights

RIDGE = 0.1
"""Of the regression of excitations on inputs, relative to the inputs' mean square."""


def cluster_rows(dense: MlpWeights, groups: Tensor, std: float) -> Tensor:
    """Return rows along the mean first projection of each group of neurons.

    A token then scores by how much it excites the group on average.

    Args:
        dense: The weights of the dense MLP; of a gated one the gate counts.
        groups: [E, w] int64.
        std: Rows are as long as those of N(0, std^2) are on average: std * sqrt(D).

    Returns:
        [E, D] float32.

    Source:
        "Similarity selection" of MoEfication (Zhang et al. 2022), section 3.3.
    """
    rows = dense.up.float()[groups.to(dense.up.device)].mean(1)
    length: float = std * rows.shape[1] ** 0.5
    return F.normalize(rows, dim=1) * length


def excitation_rows(calibration: Calibration, hidden: Tensor, groups: Tensor, std: float) -> Tensor:
    """Return rows that tell from a token how much it excites each group of neurons.

    A ridge regression, from the tokens, of the summed size of a group's hidden values.

    Args:
        calibration: The MLP's inputs.
        hidden: [T, F], what they become between the projections.
        groups: [E, w] int64.
        std: See `_scaled`.

    Returns:
        [E, D] float32.
    """
    x = calibration.rows - calibration.rows.mean(0)
    size = hidden.float().abs()[:, groups].sum(2)  # [T, E]
    square = x.T @ x
    square.diagonal().add_(RIDGE * float(square.diagonal().mean()) + 1e-12)
    rows = torch.linalg.solve(square, x.T @ (size - size.mean(0))).T
    return _scaled(rows, calibration.rows, std)


def hidden_rows(
    calibration: Calibration, experts: int, seed: int, name: str, std: float, *, prompts: bool
) -> Tensor:
    """Return rows that point to groups of the MLP's inputs: each the mean of its own.

    Args:
        calibration: The MLP's inputs.
        experts: E.
        seed: Of the clusters.
        name: The site's name.
        std: See `_scaled`.
        prompts: The groups are the rows of the batch, dealt to the experts in order; else
            balanced clusters of the tokens, by direction.

    Returns:
        [E, D] float32.

    Raises:
        MoeifyError: The example inputs do not divide over the experts, or are too few.

    Source:
        Means of hidden states per prompt group: "hidden" gates of mergekit (Goddard et al. 2024).
    """
    x, batch = F.normalize(calibration.rows, dim=1), calibration.batch
    if prompts:
        if calibration.batches % experts:
            raise MoeifyError(
                f"{name}: `router: prompts` deals the rows of the example inputs to {experts} "
                f"experts, and there are {calibration.batches}: use a multiple of {experts}"
            )
        labels = batch * experts // calibration.batches
    else:
        count = len(x) // experts * experts
        if not count:
            raise MoeifyError(
                f"{name}: `router: hidden` clusters the tokens of the example inputs in {experts} "
                f"groups, and there are {len(x)}: use more"
            )
        x = x[:count]
        labels = balanced_clusters(x, experts, seed, name + " router")
    sums = torch.zeros(experts, x.shape[1]).index_add_(0, labels, x)
    counts = torch.bincount(labels, minlength=experts)
    if not bool(counts.all()):
        raise MoeifyError(f"{name}: an expert's prompts are all padding: give each some tokens")
    means = sums / counts[:, None]
    return _scaled(means, calibration.rows, std)


def _scaled(rows: Tensor, x: Tensor, std: float) -> Tensor:
    """Centre rows and spread their logits as those of a random router.

    A common part changes no softmax. The standard deviation of the logits over tokens and experts
    becomes what rows of N(0, std^2) give: std times the root of the tokens' mean square norm.
    """
    rows = rows - rows.mean(0)
    logits = x @ rows.T
    spread = (logits - logits.mean(1, keepdim=True)).std(correction=0)
    length = x.square().sum(1).mean().sqrt()
    return rows * (std * length / spread.clamp_min(1e-12))
