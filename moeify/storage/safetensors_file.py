"""Safetensors files, written in one pass and read in one pass, with every byte accounted for.

The reader allocates nothing before the sizes that a header claims are checked against the file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from moeify.errors import CheckpointError
from moeify.storage.atomic_folder import CHUNK, Folder, read_at
from moeify.storage.manifest import FileRecord, TensorRecord
from moeify.storage.strict_json import parse_json
from moeify.units import dtype_from_name, dtype_name

MAX_HEADER: Final = 100_000_000  # bytes, as in the safetensors library
MAX_DIMENSIONS: Final = 64  # as in numpy

_CODES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
DTYPES: Final[dict[str, torch.dtype]] = {name: dtype_from_name(name) for name in _CODES.values()}
CODE_OF: Final = {name: code for code, name in _CODES.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's data as a file holds it."""
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def file_head(entries: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> bytes:
    """Return how a file begins: the length of the header, and the header.

    `entries` are name, dtype and shape of each tensor, in the order of their data.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in entries:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": CODE_OF[dtype_name(dtype)],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard whose header has been checked."""

    record: FileRecord
    start: int  # of the data
    names: tuple[str, ...]  # in the order of their data, which has no gaps


def check_shard(folder: Folder, record: FileRecord, expected: Mapping[str, TensorRecord]) -> Shard:
    """Check a shard's size and header against the expected tensors, without reading its data."""
    where = folder.where(record.file)
    with folder.open(record.file, size=record.bytes) as stream:
        text = header_text(stream, record.bytes, where)
    header = header_data(text, where)
    header.pop("__metadata__", None)
    for name in sorted(expected.keys() ^ header.keys()):
        what = "is missing" if name in expected else "should not be there"
        raise CheckpointError(f"{where}: {name}: {what}")
    for name, entry in header.items():
        _same(f"{where}: {name}", entry, expected[name])
    spans = spans_of(header, record.bytes - 8 - len(text), where)
    return Shard(record, 8 + len(text), tuple(spans))


@dataclass(frozen=True, slots=True)
class Span:
    """A tensor as a checked header describes it; offsets count from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def header_text(stream: BinaryIO, size: int, where: str) -> bytes:
    """Return the header of a file of `size` bytes, whose stream is at its first byte."""
    try:
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(MAX_HEADER, size - 8):
            raise CheckpointError(f"{where}: its header claims {length} bytes of {size}")
        text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read: {error}") from error
    if len(text) != length:
        raise CheckpointError(f"{where}: ends too early: it is being changed")
    return text


def header_data(text: bytes, where: str) -> dict[str, Any]:
    """Parse a header, of which only the metadata is checked."""
    header = parse_json(text, where)
    if not isinstance(header, dict):
        raise CheckpointError(f"{where}: its header is not a mapping")
    if text[:1] != b"{":
        raise CheckpointError(f"{where}: its header begins with {text[:1]!r}, not with a brace")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__: is not a mapping of strings")
    return header


def spans_of(header: Mapping[str, Any], room: int, where: str) -> dict[str, Span]:
    """Check that the tensors of a header fill the `room` bytes behind it, without overlaps or gaps.

    `header` comes without its metadata. The result is in the order of the data.
    """
    found = {name: _span(name, entry, where) for name, entry in header.items()}
    ordered = sorted(found, key=lambda name: (found[name].start, found[name].stop, name))
    end = 0
    for name in ordered:
        span = found[name]
        if span.start != end:
            what = "overlaps the data before it" if span.start < end else "leaves a gap before it"
            offsets = [span.start, span.stop]
            raise CheckpointError(f"{where}: {name:.200}: data_offsets {offsets!r:.80}: {what}")
        end = span.stop
    if end != room:
        raise CheckpointError(f"{where}: its tensors end at byte {end} of {room}")
    return {name: found[name] for name in ordered}


def _same(where: str, entry: object, expected: TensorRecord) -> None:
    """Check an entry against the tensor that was saved."""
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape"}:
        raise CheckpointError(f"{where}: its entry in the header is damaged")
    if entry["dtype"] != CODE_OF[expected.dtype]:
        raise CheckpointError(f"{where}: dtype {entry['dtype']!r:.40} instead of {expected.dtype}")
    if not _numbers(entry["shape"]) or entry["shape"] != expected.shape:
        raise CheckpointError(f"{where}: shape {entry['shape']!r:.80}, not {expected.shape}")


def _span(name: str, entry: object, where: str) -> Span:
    if not name.isprintable():  # messages print it to a terminal
        raise CheckpointError(f"{where}: {name!r:.80}: is not a valid name for a tensor")
    where = f"{where}: {name:.200}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: its entry in the header is damaged")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _CODES:
        raise CheckpointError(f"{where}: dtype {code!r:.40}: use one of {', '.join(_CODES)}")
    dtype = DTYPES[_CODES[code]]
    if not _numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(
            f"{where}: shape {shape!r:.80}: must be up to {MAX_DIMENSIONS} integers, none negative"
        )
    if not _numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{where}: data_offsets {offsets!r:.80}: must be two integers, none negative"
        )
    start, stop = offsets
    size = dtype.itemsize
    for n in shape:  # zeros count as one: torch computes strides of the others too
        size *= max(n, 1)
        if size >= 1 << 63:
            raise CheckpointError(f"{where}: shape {shape!r:.80}: is too large for a tensor")
    size = 0 if 0 in shape else size
    if stop - start != size:
        raise CheckpointError(
            f"{where}: data_offsets {offsets!r:.80}: do not span the {size} bytes of its shape"
        )
    return Span(dtype, tuple(shape), start, stop)


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def nbytes(record: TensorRecord) -> int:
    """Return the bytes of a tensor's data."""
    return math.prod(record.shape) * DTYPES[record.dtype].itemsize


def read_shard(
    folder: Folder, shard: Shard, expected: Mapping[str, TensorRecord], *, verify: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a checked shard, on the CPU, in memory of its own.

    Raises:
        CheckpointError: The file is not the one that was saved. If `verify`, its digest is compared
            at the end: tensors yielded before an error must not be used.
    """
    where = folder.where(shard.record.file)
    digest, position = hashlib.sha256(), shard.start
    with folder.open(shard.record.file, size=shard.record.bytes) as stream:
        head = bytearray(shard.start)
        read_at(stream, memoryview(head), 0, where)
        digest.update(head)
        for name in shard.names:
            record = expected[name]
            raw = torch.empty(nbytes(record), dtype=torch.uint8)
            view: memoryview = raw.numpy().data
            for start in range(0, len(view), CHUNK):
                part = view[start : start + CHUNK]
                read_at(stream, part, position, where)
                position += len(part)
                if verify:
                    digest.update(part)
            if record.dtype == "bool" and bool((raw > 1).any()):
                raise CheckpointError(f"{where}: {name}: holds bytes that are not booleans")
            yield name, raw.view(DTYPES[record.dtype]).view(record.shape)
    if verify and digest.hexdigest() != shard.record.sha256:
        raise CheckpointError(
            f"{where}: its SHA-256 is not the one in moeify.json: the file was changed or damaged"
        )


def storable(name: str, tensor: Tensor) -> None:
    """Check that a tensor can be kept in a safetensors file."""
    if type(tensor).__name__ == "DTensor" or type(tensor.data).__name__ == "DTensor":
        raise CheckpointError(f"{name}: is sharded over ranks: gather the model first")
    if tensor.is_meta:
        raise CheckpointError(f"{name}: is on meta and has no values to save")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(f"{name}: is sparse or quantised, which cannot be saved")
    if dtype_name(tensor.dtype) not in CODE_OF:
        raise CheckpointError(f"{name}: safetensors has no dtype for {dtype_name(tensor.dtype)}")
