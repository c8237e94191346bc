"""The `asyncflow` command line with stages that take longer: `python -m tools.emulated EMULATION train ARGUMENTS`.

EMULATION is JSON of `asyncflow.profile.slow.Emulation`, such as '{"inference_s": 0.01}'.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from typing import Any
from unittest import mock

from asyncflow import cli
from asyncflow.profile.slow import Emulation
from asyncflow.run import launch
from asyncflow.run.recorded import RecordedRun
from asyncflow.signals import interrupt_on_signals


def program(emulation: Emulation) -> list[str]:
    """Return what stands behind `python` to run the command line with these stages."""
    return ["-m", "tools.emulated", json.dumps(asdict(emulation))]


def put_on_every_run(emulation: Emulation) -> None:
    """Let every run that this process launches from now on have these stages."""
    for name in ("train", "resume"):
        mock.patch.object(launch, name, _slowed(getattr(launch, name), emulation)).start()


def _slowed(launch_run: Callable[..., RecordedRun], emulation: Emulation) -> Callable[..., RecordedRun]:
    @wraps(launch_run)
    def launch_slowly(*arguments: Any) -> RecordedRun:
        *others, on_built = arguments  # as the command line calls it

        def on_built_slowly(run: RecordedRun) -> None:
            emulation.put_on(run.trainer)
            on_built(run)

        return launch_run(*others, on_built_slowly)

    return launch_slowly


def main() -> int:
    """Run the command line; return its exit code."""
    emulation = Emulation(**json.loads(sys.argv[1]))
    emulation.check()
    put_on_every_run(emulation)
    interrupt_on_signals()
    return cli.run(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
