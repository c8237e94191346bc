"""An interpreter that has numpy and the standard library, and nothing else of what is installed here."""

import os
import shlex
import sys
from pathlib import Path

import numpy as np


def make_bare_python(folder: Path, *, with_numpy: bool = True) -> Path:
    """Write a program that starts this Python without its packages, but for numpy; return it."""
    packages = folder / "packages"
    packages.mkdir(parents=True)
    if with_numpy:
        installed = Path(np.__file__).parents[1]
        for name in ("numpy", "numpy.libs"):
            if (installed / name).exists():
                (packages / name).symlink_to(installed / name)
    python = folder / "python"
    base = Path(os.path.realpath(sys.executable))
    python.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(packages))} exec {shlex.quote(str(base))} -S "$@"\n')
    python.chmod(0o755)
    return python
