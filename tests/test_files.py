"""Files are written whole, over nothing that somebody needs, and on file systems that cannot do everything."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

from asyncflow import files, terminal
from asyncflow.errors import ConfigError
from asyncflow.files import check_output, follow, lock_file, make_new_folder, point_at, temporary_name, write_atomically


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_told", set())


def refuse(number: int) -> Any:
    """Return a function that fails as a file system does."""

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("name", ["folder", "file/below", "new/" + "n" * 256, "n" * 256, "nul\0"])
def test_an_impossible_output_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out"):
        check_output(tmp_path / name, overwrite=True)


@pytest.mark.parametrize("name", ["new", "new/new", "n" * 255])
def test_an_output_may_be_new_and_its_name_as_long_as_the_file_system_takes(tmp_path: Path, name: str) -> None:
    check_output(tmp_path / name, overwrite=False)
    write_atomically(tmp_path / name, b"content")
    assert (tmp_path / name).read_bytes() == b"content"


def test_an_existing_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*old: the file exists; .* --overwrite"):
        check_output(tmp_path / "old", overwrite=False)
    check_output(tmp_path / "old", overwrite=True)


@pytest.mark.parametrize("kind", ["same", "symbolic link", "hard link", "other spelling"])
def test_what_is_read_is_never_replaced(tmp_path: Path, kind: str) -> None:
    data = tmp_path / "data"
    data.write_text("")
    (tmp_path / "symbolic link").symlink_to(data)
    (tmp_path / "hard link").hardlink_to(data)
    out = {"same": data, "other spelling": tmp_path / ".." / tmp_path.name / "data"}.get(kind, tmp_path / kind)
    with pytest.raises(ConfigError, match="which is read; give another name"):
        check_output(out, overwrite=True, inputs=[None, "lift_flow", data])


@pytest.mark.parametrize("kind", ["device", "pipe", "link"])
def test_only_regular_files_are_replaced(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(ConfigError, match="not replaced"):
        check_output(Path("/dev/null") if kind == "device" else tmp_path / kind, overwrite=True)


def test_a_folder_that_somebody_has_gets_a_number(tmp_path: Path) -> None:
    made = [make_new_folder(tmp_path / "runs" / "name") for _ in range(3)]
    assert [path.name for path in made] == ["name", "name_2", "name_3"]


def test_a_temporary_name_is_no_longer_than_the_file_system_takes(tmp_path: Path) -> None:
    temporary_name(tmp_path / ("\N{SNOWMAN}" * 85)).touch()


def test_folders_that_cannot_be_flushed_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    for content in (b"first", b"second"):
        write_atomically(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == b"second"
    assert capsys.readouterr().err.count("cannot flush") == 1


def test_a_full_disk_at_the_flush_is_an_error_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize("can_link", [True, False])
def test_a_link_means_what_it_was_last_pointed_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_link: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    point_at(tmp_path / "last", "first")  # the file system may change, as when a run is moved
    if not can_link:
        monkeypatch.setattr(os, "symlink", refuse(errno.EPERM))
    point_at(tmp_path / "last", "second")
    assert follow(tmp_path / "last").resolve() == tmp_path / "second"
    assert ("no symbolic links" in capsys.readouterr().err) is not can_link


@pytest.mark.parametrize("text", ["", "..", "../first", "gone", "first\0", "x" * 300, "\xff"])
def test_a_file_that_names_nothing_beside_it_is_no_link(tmp_path: Path, text: str) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "last").write_bytes(text.encode("latin-1"))
    assert follow(tmp_path / "last") == tmp_path / "last"


def test_a_lock_that_another_holds_is_told_from_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = lock_file(tmp_path / "lock")
    assert first is not None
    assert lock_file(tmp_path / "lock") is None
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    second = lock_file(tmp_path / "lock")
    assert second is not None
    assert "no locks" in capsys.readouterr().err
    for descriptor in (first, second):
        os.close(descriptor)


def test_a_home_that_is_unknown_leaves_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of")
    assert files.expand_user("~/x") == Path("/home/of/x")
    assert files.expand_user("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
