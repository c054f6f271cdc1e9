"""MLPs of 1x1 convolutions, shared by the tests of the finder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

D, H = 8, 24


class Conv(nn.Module):
    """An MLP of 1x1 convolutions."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(D, H, 1)
        self.down = nn.Conv2d(H, D, 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class ConvModel(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.stem, self.mlp = nn.Conv2d(3, D, 2, 2), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.mlp(x)
