"""The first file that an interpreter runs to simulate: `python boot.py DESCRIPTOR`.

Every Python since 2.7 can read this file, so that one that is too old, or lacks numpy, is refused in words. It lets
`import asyncflow` find this package alone: what else is installed beside it belongs to another interpreter.
"""

import os
import sys

if not getattr(sys.flags, "safe_path", False):  # else it is not there, as with PYTHONSAFEPATH
    del sys.path[0]  # this folder, whose `gym.py` is not gymnasium's

CONTROL = int(sys.argv[1])
WHO = "%s (Python %d.%d)" % (sys.executable, sys.version_info[0], sys.version_info[1])  # noqa: UP031  for Python 2


def refuse(reason):  # type: (str) -> None
    """Tell the parent why this interpreter cannot simulate, and leave."""
    os.write(CONTROL, (WHO + " " + reason).encode("utf-8"))
    os._exit(1)


try:  # noqa: SIM105  for Python 2
    os.dup2(2, 1)  # what simulators and their packages print is no part of the program's output
except OSError:  # both are closed
    pass

if sys.version_info < (3, 8):  # noqa: UP036
    refuse("is too old to simulate: Python 3.8 or newer is needed")
try:
    import numpy  # noqa: F401
except BaseException as error:  # whatever a broken installation raises
    said = " ".join(str(error).split())[:300]  # numpy's own explanation has forty lines
    refuse("cannot import numpy: %s; run: %s -m pip install numpy" % (said, sys.executable))  # noqa: UP031

import importlib.util  # noqa: E402

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
spec = importlib.util.spec_from_file_location(
    "asyncflow", os.path.join(PACKAGE, "__init__.py"), submodule_search_locations=[PACKAGE]
)
assert spec is not None and spec.loader is not None  # noqa: PT018  it is a file
sys.modules["asyncflow"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["asyncflow"])

from asyncflow.simulators.server import serve  # noqa: E402

serve(CONTROL)
