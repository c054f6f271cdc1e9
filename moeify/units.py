"""Sizes in bytes and dtypes as text, and back. Importable without torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["dtype_from_name", "dtype_name", "format_bytes", "parse_bytes"]

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT])(I?)B|B)?\s*", re.IGNORECASE)


def format_bytes(count: int) -> str:
    """Return a number of bytes as text in binary units.

    Example:
        >>> format_bytes(512)
        '512 B'
        >>> format_bytes(90868376)
        '86.7 MiB'
    """
    if count < 1024:
        return f"{count} B"
    value = count / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if round(value, 1) < 1024:
            return f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def parse_bytes(size: int | str, name: str) -> int:
    """Return the bytes of a size such as `5GB` (decimal), `512MiB` (binary) or a plain number.

    Args:
        size: The size.
        name: The option that it was given for, for the message.

    Raises:
        ValueError: It is not a size, or not positive.

    Example:
        >>> parse_bytes("1.5KiB", "max_shard_size")
        1536
    """
    if isinstance(size, str) and (match := _SIZE.fullmatch(size)) is not None:
        base = 1024 if match[3] else 1000
        power = " KMGT".index((match[2] or " ").upper())
        size = int(float(match[1]) * base**power)
    if isinstance(size, str | bool) or size < 1:
        raise ValueError(
            f'{name}: {size!r} is not a size; use a number of bytes or text such as "5GB"'
        )
    return size


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """Return the dtype of a name such as `float32`.

    Raises:
        ValueError: torch has no dtype of that name.
    """
    import torch  # here, so that the command line can print sizes without loading torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r:.40} is not a dtype of torch")
    return dtype
