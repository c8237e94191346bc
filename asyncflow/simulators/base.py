"""The Simulator contract: one environment, simulated step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from asyncflow.simulators.spec import EnvSpec


class StepResult(NamedTuple):
    """Result of one env step.

    Attributes:
        reward: Its reward.
        terminated: The episode is over by itself: nothing follows, and nothing bootstraps.
        truncated: The episode is cut, though it would go on: the value of the last observation bootstraps.
        is_success: The task is solved now; an episode that ends with such a step counts as a success.
    """

    reward: float
    terminated: bool
    truncated: bool
    is_success: bool


class Simulator(Protocol):
    """One simulated environment, which knows neither its horizon nor its index.

    It may have `notices`, a sequence of lines that a run shows when it starts. Where its `spec` says
    `num_start_states`, it is a `StartingSimulator`.
    """

    spec: EnvSpec

    def reset(self, seed: int) -> None:
        """Start the episode that belongs to `seed`."""

    def step(self, action: NDArray[Any]) -> tuple[float, bool] | StepResult:
        """Execute one action, [A]; return its reward and whether the task is solved now, which ends the episode.

        Where episodes end otherwise, too, return a `StepResult`.
        """

    def observe(self) -> NDArray[Any]:
        """Return the `state` observation after the last step or reset, [D]."""

    def render(self) -> dict[str, NDArray[Any]]:
        """Return what the cameras see after the last step or reset: kind -> [C, ...], as `EnvSpec.rendered` has them.

        `images` [C, 3, height, width] uint8, `points` [C, P, 6] float32. Asked for only where the `spec` has some; a
        class derived from this one needs it only then.
        """
        return {}


class StartingSimulator(Simulator, Protocol):
    """A simulator of a task of which a benchmark keeps start states."""

    def reset_to(self, seed: int, start_state: int) -> None:
        """Start an episode in one of the `spec.num_start_states` start states, counted from 0; in place of `reset`."""
