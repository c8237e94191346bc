"""`asyncflow` that halts at a place until a signal comes: `held_run.py PLACE COUNT ENVIRONMENT ARGUMENTS...`.

PLACE is a function, as `module:name`, COUNT which of its calls is held before it begins. ENVIRONMENT is `own`, the
task's, `fake`, worker processes with simulators that take no time, or `stuck`, with some whose construction never ends.
"""

import functools
import importlib
import itertools
import os
import select
import signal
import sys
import time

from fake_simulator import HarmlessSimulator, StuckSimulator


def hold_at(place, count):
    """Print a line before the call number `count` of `place`, and let it begin after a signal has come."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls = getattr(owner, name), itertools.count(1)
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)

    def hold(*args, **kwargs):
        if next(calls) == count:
            print("held", flush=True)
            while not (signal.sigpending() or select.select([woken], [], [], 0.01)[0]):
                pass  # a blocked signal wakes nobody, hence the short waits
        return original(*args, **kwargs)

    setattr(owner, name, hold)


def decide_for_ever():
    """What the collector calls instead of its policy, where PLACE is this function."""
    time.sleep(1e6)


def simulate_with(make_simulator):
    """Let every run simulate in worker processes, without robosuite."""
    from inline_worker import simulators, workers  # noqa: PLC0415  not in the workers

    from asyncflow.run import parts  # noqa: PLC0415

    parts.make_vec_env = simulators(make_simulator)
    if make_simulator is StuckSimulator:
        workers._CLOSE_TIMEOUT_S = 0.1  # none of them leaves by itself


if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup` may have had the tests themselves ignore
    place, count, environment, *sys.argv[1:] = sys.argv[1:]
    hold_at(place, int(count))
    if place == "held_run:decide_for_ever":
        import held_run  # the module whose function is held, not this one

        from asyncflow.rollout.writer import RolloutWriter

        RolloutWriter._infer = lambda *_: held_run.decide_for_ever()
    if environment != "own":
        simulate_with({"fake": HarmlessSimulator, "stuck": StuckSimulator}[environment])
    from asyncflow.cli import main

    main()
