"""When robosuite samples its observables, without asking each of them at every substep.

The observables of an environment share one clock. robosuite samples them at a substep of their own, not at the last of
a step, and rounding moves that substep from step to step; so the clock counts in robosuite's arithmetic, and
robosuite's own update runs at each substep at which it does more than count. It must not know about controllers.
"""

from __future__ import annotations

from typing import Any

from robosuite.utils.observables import Observable


class ObservableClock:
    """Runs an environment's observables for one step: `start`, a `tick` after every substep, `stop`.

    Observables whose clocks differ (a sampling rate or a delay of their own) are updated at every substep.
    """

    def __init__(self, env: Any) -> None:
        self._env = env
        self._enabled: list[Any] = []
        self._is_shared = False
        self._time_s = self._period_s = self._delay_s = 0.0
        self._is_sampled = False

    def start(self) -> None:
        """Read the observables' clocks, which a reset or a forced update may have changed."""
        self._enabled = [each for each in self._env._observables.values() if each._enabled]
        clocks = {_read_clock(each) for each in self._enabled}
        self._is_shared = len(clocks) == 1
        if self._is_shared:
            self._time_s, self._is_sampled, self._period_s, self._delay_s = clocks.pop()

    def tick(self) -> None:
        """Let a substep pass."""
        time_s = self._time_s + self._env.model_timestep
        if self._is_shared and not self._is_due(time_s):
            self._time_s = time_s
            return
        self.stop()
        self._env._update_observables()
        self.start()

    def pass_until_due(self, limit: int) -> int:
        """Return how many substeps pass, at most `limit`, the last of which is to be told by `tick`."""
        for count in range(1, limit):
            time_s = self._time_s + self._env.model_timestep
            if not self._is_shared or self._is_due(time_s):
                return count
            self._time_s = time_s
        return limit

    def stop(self) -> None:
        """Hand the time that has passed to the observables."""
        if self._is_shared:
            for observable in self._enabled:
                observable._time_since_last_sample = self._time_s

    def _is_due(self, time_s: float) -> bool:
        """Return whether `Observable.update` would sample or begin a new period at this time."""
        is_sampling = not self._is_sampled and self._period_s - self._delay_s >= time_s
        return is_sampling or time_s >= self._period_s


def has_covered_observables(env: Any) -> bool:
    """Return whether every observable keeps time as robosuite's own do."""
    return all(type(each) is Observable for each in env._observables.values())


def _read_clock(observable: Any) -> tuple[float, bool, float, float]:
    return (
        observable._time_since_last_sample,
        observable._sampled,
        observable._sampling_timestep,
        observable._current_delay,
    )
