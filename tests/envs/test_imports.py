"""A package that cannot be imported is named in one line, with the command that mends it."""

import importlib
import re
import sys

import pytest

from asyncflow.errors import ConfigError
from asyncflow.simulators.imports import explain_import
from asyncflow.simulators.robosuite.cameras import import_robosuite


def fail(folder, **files):
    """Import `top` from a folder that looks like installed packages; return what that raises."""
    packages = folder / "site-packages"
    packages.mkdir()
    for name, text in files.items():
        (packages / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(packages)
        with pytest.raises(BaseException) as info:  # noqa: PT011  any kind will do
            __import__("top")
    return info.value


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"top": "import below", "below": "raise OSError('libGL.so\\nis missing')"},
            "cannot import below: OSError: libGL",
        ),
        ({"top": "import json; json.loads('{')"}, "cannot import top: JSONDecodeError: Expecting"),
        (
            {"top": "from math import missing"},
            "cannot import top: ImportError: cannot import name 'missing' from 'math'",
        ),
        (
            {"top": "import absent_package.part"},
            "has no package absent_package; run: .* -m pip install absent_package$",
        ),
        ({"top": "import sys; sys.exit()"}, "cannot import top: SystemExit:;"),
    ],
)
def test_the_innermost_installed_package_is_named(files, expected, tmp_path):
    line = explain_import(fail(tmp_path, **files), "my_module")
    assert re.search(expected, line)
    assert "; run: " in line
    assert "\n" not in line


def test_a_part_that_an_older_version_lacks_names_the_version():
    with pytest.raises(ModuleNotFoundError) as info:
        import numpy.lacking  # noqa: F401, PLC0415
    assert "its numpy " in explain_import(info.value, "my_module")


def test_a_file_of_ones_own_is_not_to_be_installed_first():
    with pytest.raises(ModuleNotFoundError) as info:
        importlib.import_module("absent_file.py")
    line = explain_import(info.value, "absent_file.py")
    assert "if it is a file of yours, name it without .py, and set PYTHONPATH" in line
    assert line.index("file of yours") < line.index("pip install")


def test_robosuite_that_is_missing_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "robosuite"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.import_module", _find_nothing)
    with pytest.raises(ConfigError, match=r"has no package robosuite; run: pip install 'asyncflow\[robosuite\]'$"):
        import_robosuite()


def _find_nothing(name):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
