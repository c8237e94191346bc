"""A missing system tool is named in one line before anything is built."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(("missing", "message"), [("cmake", "needs CMake"), ("cc", "needs a C compiler")])
def test_a_missing_tool_is_one_line(tmp_path, missing, message):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in {"sh", "cc", "cmake"} - {missing}:
        (tools / tool).symlink_to(shutil.which(tool) or "/bin/sh")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    command = [shutil.which("make"), "install", f"PYTHON={sys.executable}"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert message in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert not (tmp_path / ".venv").exists()


def test_a_wrong_python_is_one_line(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    command = [shutil.which("make"), "install", "PYTHON=/bin/false"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "asyncflow needs Python 3.10 to 3.12" in done.stdout
    assert not (tmp_path / ".venv").exists()
