"""Imported once by the server that forks ranks: what every rank would else load for itself."""

from __future__ import annotations

import torch.distributed.tensor.parallel
import torch.testing._internal.distributed.fake_pg  # noqa: F401

import moeify.cli.demo.run
import moeify.convert.pipeline  # noqa: F401
from moeify.kernels.cpu.compile import library

for name in ("gate", "rows", "experts", "experts_backward"):
    library(name)  # loads C++ code, starts no thread
