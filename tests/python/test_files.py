"""Files and folders are written atomically: complete, or as they were before."""

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from lighthouse.core import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_that_could_not_be_written_is_as_it_was(tmp_path, monkeypatch, before):
    file = tmp_path / "a.json"
    if before is not None:
        file.write_text(before)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_whole(file, "new")
    assert names(tmp_path) == ([] if before is None else ["a.json"])
    assert before is None or file.read_text() == before


@pytest.mark.parametrize("content, found", [("Füße\n", "Füße\n".encode()), (b"\xff", b"\xff")], ids=["text", "bytes"])
def test_a_file_is_replaced(tmp_path, content, found):
    (tmp_path / "a").write_text("old")
    files.write_whole(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == found and names(tmp_path) == ["a"]


def _write(file: Path, number: int) -> None:
    for _ in range(20):
        files.write_whole(file, str(number) * 1000)


def test_several_processes_may_write_a_file(tmp_path):
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(_write, [tmp_path / "a"] * 2, [1, 2]))
    assert (tmp_path / "a").read_text() in ("1" * 1000, "2" * 1000) and names(tmp_path) == ["a"]


def test_a_folder_that_could_not_be_filled_is_as_it_was(tmp_path):
    def fill(folder: Path) -> None:
        folder.mkdir()
        (folder / "new").write_text("")

    def fail(folder: Path) -> None:
        fill(folder)
        raise RuntimeError

    files.write_whole_folder(tmp_path / "a", fill)
    (tmp_path / "a" / "new").rename(tmp_path / "a" / "old")
    with pytest.raises(RuntimeError):
        files.write_whole_folder(tmp_path / "a", fail)
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["old"]
    files.write_whole_folder(tmp_path / "a", fill)
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["new"]
