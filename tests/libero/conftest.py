"""The interpreter that has LIBERO; `make test-libero` sets one up."""

import os
from pathlib import Path

import pytest

from asyncflow.config.interpreters import remembered

LIBERO_PYTHON = "ASYNCFLOW_LIBERO_PYTHON"


@pytest.fixture(scope="session")
def libero_python() -> str:
    """Return the interpreter, or skip."""
    path = os.environ.get(LIBERO_PYTHON) or remembered("libero")
    if not path:
        pytest.skip(f"needs an interpreter that has LIBERO ({LIBERO_PYTHON}): make test-libero")
    assert Path(path).is_file(), f"{LIBERO_PYTHON} = {path}"
    return path
