"""Records are written whole and in order, whatever the disk does; a resumed run starts from whole rows."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from full_disk import full_disk

from asyncflow.errors import ConfigError
from asyncflow.metrics.files import JsonLines, RecordFile, cut_rows


def test_what_was_partly_written_is_cut_off(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "log", "log")
    file.append(b"first\n")
    with full_disk(tmp_path, num_bytes=3):
        file.append(b"second\n")
        assert (tmp_path / "log").read_bytes() == b"first\n"
    assert file.append(b"third\n") == []
    file.close()
    assert (tmp_path / "log").read_bytes() == b"first\nsecond\nthird\n"


def test_what_could_not_be_cut_off_at_once_is_cut_off_before_the_next_record(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "log", "log")
    file.append(b"first\n")
    with (tmp_path / "log").open("ab") as other:
        other.write(b"sec")
    file.append(b"second\n")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"first\nsecond\n"


def test_a_file_that_is_opened_again_is_appended_to(tmp_path: Path) -> None:
    for record in (b"first\n", b"second\n"):
        file = RecordFile(tmp_path / "log", "log")
        file.append(record)
        file.close()
    assert (tmp_path / "log").read_bytes() == b"first\nsecond\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_without_room_is_reported_with_the_number_of_rows_that_wait(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    file = JsonLines(tmp_path)
    problems = [*file.write({"env_steps": 1}), *file.write({"env_steps": 2}), *file.close()]
    reason = f"metrics.jsonl: {os.strerror(errno.ENOSPC)}; rows"
    assert problems == [f"{reason} waiting: 1", f"{reason} waiting: 2", f"{reason} lost: 2"]


def row(updates: int) -> str:
    return f'{{"env_steps": {100 * updates}, "updates": {updates}}}\n'


def test_rows_of_later_updates_are_removed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(row(1) + row(2) + row(3))
    assert cut_rows(tmp_path, 2) == 200
    assert (tmp_path / "metrics.jsonl").read_text() == row(1) + row(2)


@pytest.mark.parametrize("torn", ['{"env_steps": 300, "upd', row(2).rstrip(), "\0\0\0\n"])
def test_a_torn_last_line_is_removed(tmp_path: Path, torn: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(row(1) + torn)
    assert cut_rows(tmp_path, 5) == 100
    assert (tmp_path / "metrics.jsonl").read_text() == row(1)


def test_without_rows_there_is_nothing_to_remove(tmp_path: Path) -> None:
    assert cut_rows(tmp_path, 3) is None
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_rows_are_removed_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "metrics.jsonl").write_text(row(1) + row(2))
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        cut_rows(tmp_path, 1)
    assert [path.read_text() for path in tmp_path.iterdir()] == [row(1) + row(2)]


def test_a_file_that_cannot_be_cut_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(row(1) + row(2))
    with full_disk(tmp_path, num_bytes=-len(row(1)) - 10), pytest.raises(ConfigError, match="rows after update 1 must"):
        cut_rows(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == row(1) + row(2)


@pytest.mark.parametrize(
    "line",
    [
        b'{"env_steps": "x", "updates": 2}', b'{"env_steps": null, "updates": 2}', b'{"env_steps": -1, "updates": 2}',
        b'{"env_steps": 200, "updates": "x"}', b'{"env_steps": 200, "updates": 2, "train/entropy": "low"}',
        b'{"env_steps": 1e400, "updates": 2}', b'{"env_steps": 9' + b"9" * 60 + b', "updates": 2}', b"null", b"[]",
        b"[" * 100_000, b"\xff", b"",
    ],
    ids=range(12),
)  # fmt: skip
def test_what_is_no_row_is_cut_off(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"env_steps": 100, "updates": 1}\n' + line + b"\n")
    assert cut_rows(tmp_path, 5) == 100
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 1


def test_a_folder_in_place_of_the_rows_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: cannot read it: Is a directory"):
        cut_rows(tmp_path, 5)
