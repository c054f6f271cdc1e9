"""The random generators of a process in a sharded checkpoint: `rng.<rank>.<kind>`, as bytes."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moeify.errors import CheckpointError
from moeify.storage.strict_json import parse_json

__all__ = ["Generators"]


class Generators:
    """The random generators of this process, as bytes by kind."""

    @staticmethod
    def collect() -> dict[str, Tensor]:
        """Return their state: "torch", "cuda" (of the current device), "python", "numpy"."""
        found = {"torch": torch.get_rng_state(), "python": _bytes(random.getstate())}
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            found["cuda"] = torch.cuda.get_rng_state()
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            name, keys, *rest = numpy.random.get_state()
            found["numpy"] = _bytes([name, keys.tolist(), *rest])
        return found

    @staticmethod
    def check(found: Mapping[str, Tensor], where: str) -> dict[str, Any]:
        """Return states ready to be set; raise if one is not a state."""
        ready: dict[str, Any] = {}
        try:
            for kind, raw in found.items():
                if kind == "torch":
                    torch.Generator().set_state(raw)
                    ready[kind] = raw
                elif kind == "cuda":
                    ready[kind] = raw
                else:
                    data = parse_json(bytes(raw.tolist()), f"{where}: rng: {kind}")
                    if kind == "python":
                        ready[kind] = (data[0], tuple(data[1]), data[2])
                        random.Random().setstate(ready[kind])
                    elif (numpy := sys.modules.get("numpy")) is not None:
                        ready[kind] = tuple(data)
                        numpy.random.RandomState().set_state(ready[kind])
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{where}: rng: {kind}: is not a generator state") from error
        return ready

    @staticmethod
    def restore(ready: Mapping[str, Any]) -> None:
        """Set the states that `check` returned."""
        if "torch" in ready:
            torch.set_rng_state(ready["torch"])
        if "cuda" in ready and torch.cuda.is_available():
            torch.cuda.set_rng_state(ready["cuda"])
        if "python" in ready:
            random.setstate(ready["python"])
        numpy = sys.modules.get("numpy")
        if "numpy" in ready and numpy is not None:
            numpy.random.set_state(ready["numpy"])

    @staticmethod
    def derive(digest: str, rank: int) -> None:
        """Seed all of them, for a rank that is new, from the digest of rank 0's saved state."""
        text = hashlib.sha256(f"{digest} {rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(text[:8], "little") >> 1)
        random.seed(int.from_bytes(text[8:16], "little"))
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed(int.from_bytes(text[16:20], "little"))


def _bytes(data: Any) -> Tensor:
    text = json.dumps(data, separators=(",", ":")).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
