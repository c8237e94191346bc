"""Where caches go when the packages' folders or the home folder cannot be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from asyncflow import caches, terminal

VARIABLES = ("NUMBA_CACHE_DIR", "MPLCONFIGDIR")


@pytest.fixture
def unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """Return a set of folders, by default those of packages and home, in which nothing can be written, even by root."""
    for name in (*VARIABLES, "ASYNCFLOW_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(terminal, "_told", set())
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    folders = {*caches._numba_folders(), tmp_path / "home"}
    can_write = caches._can_write
    monkeypatch.setattr(caches, "_can_write", lambda path: not folders & {path, *path.parents} and can_write(path))
    return folders


def chosen() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in VARIABLES}


def test_nothing_changes_where_all_can_be_written(unwritable: set[Path]) -> None:
    unwritable.clear()
    caches.prepare_caches()
    assert chosen() == dict.fromkeys(VARIABLES)


def test_a_users_cache_folder_is_taken_and_told_once(
    unwritable: set[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for _ in range(2):
        caches.prepare_caches()
    assert chosen() == {name: str(tmp_path / "xdg" / "asyncflow" / name.lower()) for name in VARIABLES}
    assert capsys.readouterr().err.count(str(tmp_path / "xdg")) == 1


def test_the_folder_that_the_user_names_is_taken_without_a_word(
    unwritable: set[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unwritable.clear()
    monkeypatch.setenv("ASYNCFLOW_HOME", str(tmp_path / "own"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "mpl"))
    caches.prepare_caches()
    assert chosen() == {"NUMBA_CACHE_DIR": str(tmp_path / "own/numba_cache_dir"), "MPLCONFIGDIR": str(tmp_path / "mpl")}
    assert capsys.readouterr().err == ""


def test_without_a_home_a_temporary_folder_of_this_user_is_taken(unwritable: set[Path], tmp_path: Path) -> None:
    caches.prepare_caches()
    folder = tmp_path / "tmp" / f"asyncflow-{os.getuid()}"
    assert chosen() == {name: str(folder / name.lower()) for name in VARIABLES}
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["others may write", "link"])
def test_a_temporary_folder_that_somebody_else_made_is_not_trusted(
    unwritable: set[Path], tmp_path: Path, kind: str
) -> None:
    """numba runs what it reads there."""
    laid = tmp_path / "tmp" / f"asyncflow-{os.getuid()}"
    (tmp_path / "target").mkdir()
    if kind == "link":
        laid.symlink_to(tmp_path / "target")
    else:
        laid.mkdir()
        laid.chmod(0o777)
    caches.prepare_caches()
    assert not [path for path in chosen().values() if laid in Path(str(path)).parents]


def test_what_the_environment_names_is_kept_if_it_can_be_written(
    unwritable: set[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "home" / "mpl"))
    caches.prepare_caches()
    assert chosen()["NUMBA_CACHE_DIR"] == str(tmp_path / "numba")
    assert chosen()["MPLCONFIGDIR"] == str(tmp_path / "tmp" / f"asyncflow-{os.getuid()}" / "mplconfigdir")
