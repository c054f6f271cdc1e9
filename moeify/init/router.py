"""Router weights from clusters of neurons, or from the inputs of MLPs.

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
"""Penalty of the regression of excitations on inputs, relative to the inputs' mean square."""


def cluster_rows(dense: MlpWeights, groups: Tensor, std: float) -> Tensor:
    """Return rows along the mean first projection of each group of neurons.

    A token's score is then how much it excites the group on average; of a gated MLP the gate
    decides. Rows [E, D] are as long as those of N(0, std^2) are on average, std * sqrt(D).

    Source:
        "Similarity selection" of MoEfication (Zhang et al. 2022), section 3.3.
    """
    rows = dense.up.float()[groups.to(dense.up.device)].mean(1)
    length: float = std * rows.shape[1] ** 0.5
    return F.normalize(rows, dim=1) * length


def excitation_rows(calibration: Calibration, hidden: Tensor, groups: Tensor, std: float) -> Tensor:
    """Return rows [E, D] that predict from a token how much it excites each group of neurons.

    A ridge regression from the tokens to the sum of a group's absolute hidden values [T, F].
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
    """Return rows [E, D] that are the means of E groups of the MLP's inputs.

    With `prompts` the groups are the rows of the batch, divided among the experts in order; else
    balanced clusters of the tokens, by direction.

    Raises:
        MoeifyError: The example inputs do not divide over the experts, or are too few.

    Source:
        Means of hidden states per prompt group: "hidden" gates of mergekit (Goddard et al. 2024).
    """
    x, batch = F.normalize(calibration.rows, dim=1), calibration.batch
    if prompts:
        if calibration.batches % experts:
            raise MoeifyError(
                f"{name}: `router: prompts` divides the rows of the example inputs among {experts} "
                f"experts, but there are {calibration.batches}: use a multiple of {experts}"
            )
        labels = batch * experts // calibration.batches
    else:
        count = len(x) // experts * experts
        if not count:
            raise MoeifyError(
                f"{name}: `router: hidden` clusters the tokens of the example inputs in {experts} "
                f"groups, but there are {len(x)}: use more"
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
    """Centre rows and scale them so that their logits spread like those of a random router.

    A part common to all rows changes no softmax. The standard deviation of the logits over tokens
    and experts becomes that of rows from N(0, std^2): std times the tokens' root mean square norm.
    """
    rows = rows - rows.mean(0)
    logits = x @ rows.T
    spread = (logits - logits.mean(1, keepdim=True)).std(correction=0)
    length = x.square().sum(1).mean().sqrt()
    return rows * (std * length / spread.clamp_min(1e-12))
