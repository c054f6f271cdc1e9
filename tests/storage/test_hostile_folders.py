"""Hostile and broken folders: read exactly, or refused with a `CheckpointError`; nothing else."""

from __future__ import annotations

import copy
import json
import os
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeify.errors import CheckpointError
from moeify.storage.folder_reader import INDEX, WEIGHTS, CheckpointReader
from moeify.storage.safetensors_file import MAX_HEADER

HEADER: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BOOL", "shape": [4], "data_offsets": [24, 28]},
    "c": {"dtype": "I16", "shape": [], "data_offsets": [28, 30]},
}
DATA = bytes(range(24)) + b"\1\0\1\0" + b"xy"


def write(
    folder: Path, header: Any, data: bytes = DATA, *, length: int | None = None, file: str = WEIGHTS
) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (folder / file).write_bytes(size.to_bytes(8, "little") + text + data)


def changed(**entries: Any) -> dict[str, Any]:
    """The header with other entries, or without one that is None."""
    found = copy.deepcopy(HEADER) | entries
    return {name: entry for name, entry in found.items() if entry is not None}


def entry(name: str, **changes: Any) -> dict[str, Any]:
    return changed(**{name: HEADER[name] | changes})


PLAIN = json.dumps(HEADER)
HEADERS: dict[str, tuple[Any, str]] = {
    "no mapping": (b"[]", "not a mapping"),
    "a number": (b"7", "not a mapping"),
    "no JSON": (b"{", "not JSON"),
    "empty": (b"", "not JSON"),
    "no UTF-8": (PLAIN.encode().replace(b'"a"', b'"\xff"'), "not JSON"),
    "UTF-16": (PLAIN.encode("utf-16"), "not JSON"),
    "byte order mark": (b"\xef\xbb\xbf" + PLAIN.encode(), "not JSON"),
    "leading space": (b" " + PLAIN.encode(), "begins with b' '"),
    "too deep": (b'{"a":' * 50_000, "not JSON"),
    "too deep metadata": (b'{"__metadata__":' + b"[" * 50_000, "not JSON"),
    "long number": (PLAIN.replace("24", "9" * 5_000).encode(), "not JSON"),
    "NaN": (PLAIN.replace("24", "NaN").encode(), "NaN"),
    "infinite": (PLAIN.replace("24", "1e999").encode(), "data_offsets"),
    "key twice": (PLAIN.replace('"c"', '"a"').encode(), "a: appears twice"),
    "field twice": (PLAIN.replace('"shape"', '"dtype": "F32", "shape"').encode(), "twice"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', "twice"),
    "metadata a list": (changed(__metadata__=[]), "__metadata__"),
    "metadata with numbers": (changed(__metadata__={"a": 1}), "__metadata__"),
    "entry a list": (changed(a=[]), "damaged"),
    "entry null": (PLAIN.replace(json.dumps(HEADER["a"]), "null").encode(), "damaged"),
    "field missing": (changed(a={"dtype": "F32", "shape": [2, 3]}), "damaged"),
    "field too many": (entry("a", more=1), "damaged"),
    "unknown dtype": (entry("a", dtype="F4"), "dtype 'F4'"),
    "dtype a list": (entry("a", dtype=["F32"]), "dtype"),
    "dtype in lower case": (entry("a", dtype="f32"), "dtype 'f32'"),
    "other dtype": (entry("a", dtype="F64"), "do not span the 48 bytes"),
    "shape of floats": (entry("a", shape=[2.0, 3.0]), "up to 64 integers, none negative"),
    "shape of booleans": (entry("c", shape=[True]), "up to 64 integers, none negative"),
    "shape negative": (entry("a", shape=[-2, -3]), "up to 64 integers, none negative"),
    "shape a text": (entry("a", shape="23"), "up to 64 integers, none negative"),
    "shape too small": (entry("a", shape=[2, 2]), "do not span the 16 bytes"),
    "shape overflows to 24": (entry("a", shape=[2**62 + 6, 4]), "is too large"),
    "shape overflows to 0": (entry("a", shape=[2**32, 2**32], data_offsets=[0, 0]), "is too large"),
    "shape zero of many": (
        entry("a", shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
        "is too large",
    ),
    "shape of 65": (entry("c", shape=[1] * 65), "up to 64 integers, none negative"),
    "shape of 2^40": (entry("a", shape=[2**38], data_offsets=[0, 2**40]), "gap|overlaps|end at"),
    "offsets of 2^63": (entry("a", data_offsets=[2**63, 2**63 + 24]), "gap"),
    "offsets negative": (entry("a", data_offsets=[-24, 0]), "two integers, none negative"),
    "offsets of booleans": (entry("a", data_offsets=[False, 24]), "two integers, none negative"),
    "offsets of floats": (entry("a", data_offsets=[0.0, 24.0]), "two integers, none negative"),
    "offsets three": (entry("a", data_offsets=[0, 24, 24]), "two integers, none negative"),
    "offsets turned": (entry("a", data_offsets=[24, 0]), "do not span the 24 bytes"),
    "offsets beyond the end": (entry("c", data_offsets=[28, 32], dtype="I32"), "end at byte 32"),
    "overlap": (entry("c", data_offsets=[27, 29]), "overlaps"),
    "the same data twice": (changed(d=HEADER["c"]), "overlaps"),
    "gap": (entry("c", data_offsets=[30, 32]), "gap"),
    "a hidden middle": (changed(b=None), "gap"),
    "a hidden end": (changed(c=None), "end at byte 28 of 30"),
    "no tensors": (b"{}", "end at byte 0 of 30"),
    "name of controls": (changed(**{"\x1b[2J": {**HEADER["c"]}}), "is not a valid name"),
    "name of half a pair": (PLAIN.replace('"c"', '"\\ud800"').encode(), "is not a valid name"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name: str, tmp_path: Path) -> None:
    header, message = HEADERS[name]
    write(tmp_path, header)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=message) as raised:
        CheckpointReader(tmp_path)
    assert str(tmp_path / WEIGHTS) in str(raised.value)
    assert len(str(raised.value)) < 1_000
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, MAX_HEADER + 1, len(PLAIN) + 31])
def test_claimed_length(length: int, tmp_path: Path) -> None:
    write(tmp_path, HEADER, length=length)
    with pytest.raises(CheckpointError, match=f"claims {length} bytes"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 8, 9, 200])
def test_truncated(size: int, tmp_path: Path) -> None:
    write(tmp_path, HEADER)
    os.truncate(tmp_path / WEIGHTS, size)
    with pytest.raises(CheckpointError, match=r"claims|not JSON|end at"):
        CheckpointReader(tmp_path)


def test_trailing_bytes(tmp_path: Path) -> None:
    """An archive behind the tensors, as polyglot files have it."""
    write(tmp_path, HEADER, DATA + b"PK\5\6" + b"\0" * 18)
    with pytest.raises(CheckpointError, match="end at byte 30 of 52"):
        CheckpointReader(tmp_path)


def test_claims_are_not_allocated(tmp_path: Path) -> None:
    """A file of 1 TiB that is all holes is opened, and read by rows; its header is not believed."""
    size = 1 << 40
    write(tmp_path, {"a": {"dtype": "U8", "shape": [1 << 20, 1 << 20], "data_offsets": [0, size]}})
    file = tmp_path / WEIGHTS
    start = file.stat().st_size - len(DATA)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="end at byte"):
        CheckpointReader(tmp_path)
    os.truncate(file, start + size)
    with CheckpointReader(tmp_path) as folder:
        assert folder.read("a", 0, 1).flatten()[: len(DATA)].tolist() == list(DATA)
        assert int(folder.read("a", (1 << 20) - 1).sum()) == 0
    with file.open("r+b") as stream:
        stream.write((1 << 39).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match="claims"):
        CheckpointReader(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_no_boolean(tmp_path: Path) -> None:
    write(tmp_path, HEADER, DATA.replace(b"\1\0\1\0", b"\1\0\2\0"))
    folder = CheckpointReader(tmp_path)
    assert folder.read("b", 0, 2).tolist() == [True, False]
    with pytest.raises(CheckpointError, match="b: holds bytes that are not booleans"):
        folder.read("b")


# -- anything at all

NUMBERS = st.integers(-3, 60) | st.integers() | st.booleans() | st.floats()
JUNK = st.recursive(
    st.none() | NUMBERS | st.text(max_size=5) | st.sampled_from(["F32", "BOOL", "I16", "F8_E4M3"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BOOL", "I16", "U8", "X"]),
        "shape": st.lists(st.integers(-1, 8) | NUMBERS, max_size=3),
        "data_offsets": st.lists(st.sampled_from([0, 24, 28, 30]) | NUMBERS, max_size=3),
    }
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A valid file with something wrong in it, or nothing, or junk."""
    kind = draw(st.sampled_from(["field", "entry", "json", "bytes"]))
    header: Any = copy.deepcopy(HEADER)
    if kind == "field":
        name, field = draw(st.sampled_from("abc")), draw(st.sampled_from(list(HEADER["a"])))
        header[name][field] = draw(JUNK | st.lists(NUMBERS, max_size=3))
    elif kind == "entry":
        for name in draw(st.lists(st.sampled_from("abcd") | st.text(max_size=4), max_size=3)):
            header[name] = draw(ENTRY | JUNK)
    elif kind == "json":
        header = draw(JUNK)
    text = json.dumps(header).encode()
    data = bytearray(len(text).to_bytes(8, "little") + text + DATA)
    if kind == "bytes":
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        del data[draw(st.integers(0, len(data)) | st.just(len(data))) :]
    return bytes(data)


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=files())
def test_any_file(data: bytes, tmp_path: Path) -> None:
    """It is refused, or read as the safetensors library reads it."""
    (tmp_path / WEIGHTS).write_bytes(data)
    try:
        with CheckpointReader(tmp_path) as folder:
            got = {name: folder.read(name) for name in folder.keys}
    except CheckpointError:
        return
    want = safetensors.torch.load(data)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        assert got[name].numpy().tobytes() == tensor.numpy().tobytes()


# -- folders


def two_files(folder: Path) -> Path:
    """A sound folder of two files and an index."""
    folder.mkdir()
    tensors = {"one": {"a": torch.ones(2), "b": torch.ones(3)}, "two": {"c": torch.ones(4)}}
    for name, held in tensors.items():
        safetensors.torch.save_file(held, folder / f"{name}.safetensors")
    placed = {key: f"{name}.safetensors" for name, held in tensors.items() for key in held}
    reindex(folder, lambda index: index.update(weight_map=placed), {"metadata": {"total_size": 36}})
    return folder


def reindex(folder: Path, change: Any, index: Any = None) -> None:
    index = index or json.loads((folder / INDEX).read_bytes())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def place(key: str, file: Any) -> Any:
    return lambda folder: reindex(folder, lambda index: index["weight_map"].update({key: file}))


def replaced(file: str, make: Any) -> Any:
    """Something else under a file's name; the file itself lies beside the folder."""

    def apply(folder: Path) -> None:
        (folder / file).rename(folder.parent / "elsewhere.safetensors")
        make(folder / file)

    return apply


def linked(file: str) -> Any:
    return replaced(
        file, lambda path: path.symlink_to(path.parent.parent / "elsewhere.safetensors")
    )


def more(file: str, **tensors: torch.Tensor) -> Any:
    return lambda folder: safetensors.torch.save_file(tensors, folder / file)


def only(file: str, data: bytes = b"") -> Any:
    def apply(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / file).write_bytes(data)

    return apply


def text_of(file: str, text: str) -> Any:
    return lambda folder: (folder / file).write_text(text)


def fifo_of_pickles(folder: Path) -> None:
    """Whoever opened it would wait for ever."""
    only("config.json", b"{}")(folder)
    os.mkfifo(folder / "pytorch_model.bin")


FOLDERS: dict[str, tuple[Any, str]] = {
    "up": (place("a", "../elsewhere.safetensors"), "not a safetensors file in the same folder"),
    "up inside": (place("a", "x/../one.safetensors"), "in the same folder"),
    "absolute": (place("a", "/etc/one.safetensors"), "in the same folder"),
    "backslash": (place("a", "..\\one.safetensors"), "in the same folder"),
    "drive": (place("a", "C:one.safetensors"), "in the same folder"),
    "hidden": (place("a", "...safetensors"), "in the same folder"),
    "NUL": (place("a", "\0.safetensors"), "in the same folder"),
    "terminal": (place("a", "\x1b[2J.safetensors"), "in the same folder"),
    "no text": (place("a", 7), "in the same folder"),
    "a pickle": (place("a", "one.bin"), "in the same folder"),
    "missing file": (lambda f: (f / "two.safetensors").unlink(), "two.safetensors: is missing"),
    "long name": (place("a", "0" * 300 + ".safetensors"), "cannot be opened"),
    "misplaced": (place("c", "one.safetensors"), "is missing, but the index places it there"),
    "swapped": (
        lambda f: (place("a", "two.safetensors")(f), place("c", "one.safetensors")(f)),
        "the index does not place it there",
    ),
    "not indexed": (
        more("two.safetensors", c=torch.ones(4), d=torch.ones(1)),
        r"d: the index does not place it there \(None\)",
    ),
    "in both files": (
        more("two.safetensors", c=torch.ones(4), a=torch.ones(2)),
        r"two.safetensors: a: is in one.safetensors too",
    ),
    "indexed and lost": (more("two.safetensors", d=torch.ones(4)), "does not place it there"),
    "index twice": (
        text_of(INDEX, '{"weight_map": {"a": "x", "a": "y"}}'),
        "a: appears twice",
    ),
    "index a list": (text_of(INDEX, "[]"), "not a mapping"),
    "index empty": (text_of(INDEX, "{}"), "weight_map"),
    "index of nothing": (text_of(INDEX, '{"weight_map": {}}'), "weight_map"),
    "index too deep": (text_of(INDEX, '{"weight_map":' * 50_000), "not JSON"),
    "left over": (more(WEIGHTS, a=torch.ones(2)), "holds both"),
    "linked file": (linked("one.safetensors"), "symbolic link"),
    "linked index": (linked(INDEX), "symbolic link"),
    "FIFO": (replaced("one.safetensors", os.mkfifo), "not a regular file"),
    "FIFO as index": (replaced(INDEX, os.mkfifo), "not a regular file"),
    "folder as file": (replaced("one.safetensors", os.mkdir), "not a regular file"),
    "FIFO as config": (lambda f: os.mkfifo(f / "config.json"), "not a regular file"),
    "config a list": (text_of("config.json", "[]"), "config.json: is not a mapping"),
    "pickles": (
        only("pytorch_model.bin", pickle.dumps(print)),
        "'pytorch_model.bin' is never opened: save the model as safetensors",
    ),
    "pickles in a FIFO": (fifo_of_pickles, "never opened"),
    "an adapter": (only("adapter_model.safetensors"), "merge that into its base model"),
    "a lone shard": (only("model-00001-of-00002.safetensors"), "alone may not be the whole model"),
    "nothing": (only("README.md"), "has neither"),
    "no folder": (lambda f: shutil.rmtree(f), "cannot be opened as a folder"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_bytes(b"")), "cannot be opened as a folder"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, tmp_path: Path) -> None:
    damage, message = FOLDERS[name]
    folder = two_files(tmp_path / "model")
    CheckpointReader(folder).close()
    damage(folder)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(folder)
    assert len(os.listdir("/proc/self/fd")) == before


def test_harmless_oddities(tmp_path: Path) -> None:
    """A wrong total is said; files that no index names, such as another format, do not matter."""
    folder = two_files(tmp_path / "model")
    reindex(folder, lambda index: index["metadata"].update(total_size=True))
    more("consolidated.safetensors", z=torch.ones(1))(folder)
    only_pickle = folder / "pytorch_model.bin"
    os.mkfifo(only_pickle)
    source = CheckpointReader(folder)
    assert list(source.keys) == ["a", "b", "c"]
    assert source.notes == (f"{INDEX}: total_size is True, the tensors have 36 bytes",)
    shutil.rmtree(folder)
    folder.mkdir()
    more(WEIGHTS, a=torch.ones(2))(folder)  # an index may name the one file
    reindex(folder, lambda index: None, {"weight_map": {"a": WEIGHTS}})
    assert list(CheckpointReader(folder).keys) == ["a"]
