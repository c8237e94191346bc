"""What the server of `warm_start` imports once, so that the workers it forks need not.

Such a worker is the server's child, not that of the tests. It lets go of the pipe that would keep the server alive; so
the server ends with the tests, and the worker with the server, as one that was spawned ends with its parent.
"""

import os
import signal
from multiprocessing import forkserver
from types import SimpleNamespace

from asyncflow.caches import prepare_caches
from asyncflow.envs import worker, workers  # noqa: F401  imported for those who are forked
from asyncflow.envs.robosuite import simulator
from asyncflow.signals import ENDING_SIGNALS


def _leave_with_server() -> SimpleNamespace:
    """Return the process whose end is the worker's, in place of multiprocessing's `parent_process`."""
    os.close(forkserver._forkserver._forkserver_alive_fd)
    return SimpleNamespace(pid=os.getppid())


signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)  # as a run starts its workers
prepare_caches()
simulator._register_mujoco_py()
with simulator.quiet():
    simulator.import_robosuite()
    import robomimic.utils.env_utils  # noqa: F401  and robosuite, at which it looks
    from robosuite import controllers  # noqa: F401

    from asyncflow.envs.robosuite import fast_step  # noqa: F401
worker.parent_process = _leave_with_server
