"""Worker processes that start in milliseconds: forked by a server that has imported what they need.

A spawned one imports torch and robosuite first, which costs more than most tests do. What a worker is asked, does and
says is the same.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import context, forkserver, process
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent
ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
SPAWN = context._concrete_contexts["spawn"]


def start_server() -> None:
    """Start the server unless it runs; it then serves until the tests end."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]))
        forkserver.set_forkserver_preload(["warm_worker"])
        forkserver.ensure_running()


class WarmContext(context.ForkServerContext):
    """Starts the server with the first process that is asked for."""

    def Process(self, *arguments, **keywords) -> process.BaseProcess:
        start_server()
        return context.ForkServerProcess(*arguments, **keywords)


@contextmanager
def started_by(how: context.BaseContext) -> Iterator[None]:
    """Let processes that ask to be spawned be started by another context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(context._concrete_contexts, "spawn", how)
        yield
