"""A clock for tests that stands still until it is moved: seconds of fakes are exact."""


class HandClock:
    """Takes the place of the `time` module where a tool reads it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds
