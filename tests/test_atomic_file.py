"""Single files that are whole or not there, and what killed writers leave behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from moeify.atomic_file import (
    SyncedFile,
    final_name,
    remove_leftovers,
    replace_file,
    temporary_name,
    write_new,
)

DEAD = 4194305  # above the largest process id


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.yaml"
    replace_file(path, b"old")
    fsync = os.fsync

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(os, "fsync", fsync)
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_synced(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems cannot, which is no fault; a failing disk is one."""

    def failing(folder: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("moeify.atomic_file.sync_folder", failing)
    if code == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(code)):
            replace_file(tmp_path / "a", b"data")
    else:
        replace_file(tmp_path / "a", b"data")
    assert (tmp_path / "a").read_bytes() == b"data"


def test_a_link_is_replaced_and_a_long_name_fits(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"theirs")
    (tmp_path / "link").symlink_to("other")
    replace_file(tmp_path / "link", b"ours")
    assert (tmp_path / "other").read_bytes() == b"theirs"
    assert not (tmp_path / "link").is_symlink()
    replace_file(tmp_path / ("n" * 255), b"ours")


def test_a_new_file_must_be_new(tmp_path: Path) -> None:
    digest = write_new(tmp_path / "a", b"abc")
    assert digest.startswith("ba7816bf")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", b"other")
    assert (tmp_path / "a").read_bytes() == b"abc"


def test_an_exception_abandons_a_new_file(tmp_path: Path) -> None:
    def interrupted() -> None:
        with SyncedFile(tmp_path / "b") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "b").read_bytes() in (b"", b"half")


def test_leftovers_of_dead_processes_go(tmp_path: Path) -> None:
    mine = temporary_name(tmp_path / "m")
    assert final_name(mine.name) == "m"
    assert final_name("m") == "m"
    kept = [
        mine,
        tmp_path / f".m.staging-{DEAD}-{'0' * 16}",  # of another host
        tmp_path / f".other.staging-{DEAD}-00",
        tmp_path / ".m.staging-x-00",
        tmp_path / f".m.replaced-{DEAD}-00",  # the only copy: nothing is at `m`
    ]
    gone = [tmp_path / f".m.staging-{DEAD}-00", tmp_path / f".m.staging-{DEAD}-01"]
    for path in (*kept, gone[0]):
        path.mkdir()
    gone[1].write_bytes(b"")
    remove_leftovers(tmp_path, "m")
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    (tmp_path / "m").mkdir()
    remove_leftovers(tmp_path, "m")
    assert not kept[-1].exists()
