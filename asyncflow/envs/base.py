"""The VecEnv contract: what the collector and the evaluation ask of a set of environments.

The contract holds for every environment, however it is simulated and whoever acts in it.

Shapes: N environments, n of them addressed by one call, H executed actions of a chunk, A action size, D size of the
`state` observation.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncflow.config.contracts import broken
from asyncflow.config.observations import KINDS, STATE, VECTOR, Field, Shape, make_field, name_in
from asyncflow.config.suites import TaskSpec
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.errors import ContractError, EnvError

if TYPE_CHECKING:
    from tensordict import TensorDict  # loading it would double the time in which a worker process starts

    from asyncflow.config.sections import EnvConfig


class EnvInterrupted(EnvError):
    """`VecEnv.interrupt` was called while a thread waited for simulators, or before it did."""


@dataclass(frozen=True, init=False)
class EnvSpec:
    """Description of an environment's observations and actions, which a policy must fit.

    `EnvSpec({"state": (4,), "images.top": (3, 28, 28)}, action_dim=2, horizon=40)` is enough; a bare shape stands for
    the `Field` that its key means.

    Attributes:
        obs: What an observation holds: vectors, such as `state`, then what cameras yield, by kind. A camera's key is
            `KIND.NAME`: `images.agentview` is `obs["images", "agentview"]`.
        action_dim: A.
        horizon: Env steps until an episode is truncated, at the latest.
        env_meta: robomimic's description from which the environment can be built again; empty for the toy.
        obs_keys: The simulator's names that `state` concatenates, in this order.
        obs_widths: How many numbers each of them has; empty where that is not said.
        task: Name of the task, where `env_meta` does not describe it.
        action_low: The lowest action in each dimension, -1 everywhere if empty; -inf where there is no limit.
        action_high: The highest; 1 everywhere if empty.
        rendered_with: The keys of `env` with which cameras' fields are made and which no shape tells, and their values.
        has_success: Whether episodes can succeed; False where only their returns tell how good they are.
        instruction: What the robot is told to do, in words; empty if nothing is.
        num_start_states: Start states that a benchmark keeps of the task; 0: every episode draws its own.
        tasks: The tasks that environments are spread over, environment i with task i modulo their number, where they
            are several. An observation then holds the index `task`, and what is said above of one task is empty, but
            for `horizon`, the longest one.
    """

    obs: dict[str, Field]
    action_dim: int
    horizon: int
    env_meta: dict[str, Any]
    obs_keys: tuple[str, ...]
    obs_widths: tuple[int, ...]
    task: str
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    rendered_with: dict[str, Any]
    has_success: bool
    instruction: str
    num_start_states: int
    tasks: tuple[TaskSpec, ...]

    def __init__(  # noqa: PLR0913  a record
        self,
        obs: Mapping[str, Field | Shape],
        action_dim: int,
        horizon: int,
        *,
        env_meta: dict[str, Any] | None = None,
        obs_keys: tuple[str, ...] = (),
        obs_widths: tuple[int, ...] = (),
        task: str = "",
        action_low: tuple[float, ...] = (),
        action_high: tuple[float, ...] = (),
        rendered_with: dict[str, Any] | None = None,
        has_success: bool = True,
        instruction: str = "",
        num_start_states: int = 0,
        tasks: tuple[TaskSpec, ...] = (),
    ) -> None:
        """Describe environments; see the attributes.

        Raises:
            ContractError: The limits of actions are not one for each dimension, or a low one is above its high one; or
                `obs` is no mapping.
        """
        if not isinstance(obs, Mapping):
            raise broken("EnvSpec.obs", "is", obs, "a dictionary of shapes, such as {'state': (4,)}")
        values = {
            "obs": _in_order({k: v if isinstance(v, Field) else make_field(k, v) for k, v in obs.items()}),
            "action_dim": action_dim,
            "horizon": horizon,
            "env_meta": {} if env_meta is None else env_meta,
            "obs_keys": obs_keys,
            "obs_widths": obs_widths,
            "task": task,
            "action_low": action_low,
            "action_high": action_high,
            "rendered_with": {} if rendered_with is None else rendered_with,
            "has_success": has_success,
            "instruction": instruction,
            "num_start_states": num_start_states,
            "tasks": tasks,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # frozen
        if {len(action_low), len(action_high)} - {0, action_dim}:
            raise ContractError(
                f"EnvSpec.action_low has {len(action_low)} and action_high {len(action_high)} numbers "
                f"for action_dim = {action_dim}"
            )
        if not all(low <= high for low, high in zip(action_low, action_high, strict=False)):
            raise ContractError(f"EnvSpec.action_low = {action_low} must not exceed action_high = {action_high}")

    @property
    def action_limits(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest action, [A] float32 each."""
        ones = torch.ones(self.action_dim)
        low = torch.tensor(self.action_low) if self.action_low else -ones
        high = torch.tensor(self.action_high) if self.action_high else ones
        return low, high

    @property
    def task_table(self) -> tuple[TaskSpec, ...]:
        """The tasks, of which there is one at least."""
        return self.tasks or (TaskSpec(self.task, self.instruction, self.horizon, self.num_start_states),)

    @property
    def shortest_horizon(self) -> int:
        """Env steps until an episode of the task with the shortest horizon is truncated."""
        return min(task.horizon for task in self.task_table)

    def task_ids(self, env_ids: Iterable[int]) -> list[int]:
        """Return the place in `task_table` of each environment's task: they take turns."""
        return [env % len(self.task_table) for env in env_ids]

    @property
    def state_shape(self) -> Shape:
        """(D,), or (n_obs_steps, D); empty where there is no `state`."""
        return self.obs[STATE].shape if STATE in self.obs else ()

    @property
    def n_obs_steps(self) -> int:
        """Env steps that one observation shows."""
        return self.state_shape[0] if len(self.state_shape) == 2 else 1

    @property
    def rendered(self) -> dict[str, dict[str, Shape]]:
        """Shapes of what cameras yield: kind -> camera -> shape; a kind that no camera yields is absent."""
        shapes = {kind: self.shapes(kind) for kind in KINDS}
        return {kind: by_camera for kind, by_camera in shapes.items() if by_camera}

    def shapes(self, kind: str) -> dict[str, Shape]:
        """Return the shapes of the fields of one kind, by the camera's or the vector's name."""
        return {name_in(kind, key): each.shape for key, each in self.obs.items() if each.kind == kind}

    def name_number(self, column: int) -> str:
        """Return what a number of `state` is: its place and, where that is known, the simulator's name for it."""
        ends = itertools.accumulate(self.obs_widths)
        name = next((key for key, end in zip(self.obs_keys, ends, strict=False) if column < end), "")
        return f"state[{column}]" + (f" ({name})" if name else "")

    def with_history(self, n_obs_steps: int) -> EnvSpec:
        """Return the description of observations of the last `n_obs_steps` env steps; of one, it stays as it is."""
        if n_obs_steps == 1:
            return self
        return replace(self, obs={key: each.with_history(n_obs_steps) for key, each in self.obs.items()})

    def empty_obs(self, num_envs: int) -> TensorDict:
        """Return observations of nothing, [N]: vectors, and by kind and camera what cameras yield."""
        from tensordict import TensorDict  # noqa: PLC0415  see above: not in a worker process

        obs = TensorDict({}, batch_size=[num_envs])
        for key, each in self.obs.items():
            obs[each.path(key)] = torch.zeros(num_envs, *each.shape, dtype=getattr(torch, each.dtype))
        return obs


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


def _in_order(fields: Mapping[str, Field]) -> dict[str, Field]:
    """Return vectors first, then what cameras yield, by kind: networks and random numbers come in this order."""
    order = [VECTOR, *KINDS]
    kinds = [*order, *(each.kind for each in fields.values() if each.kind not in order)]
    return dict(sorted(fields.items(), key=lambda item: kinds.index(item[1].kind)))


class Simulator(Protocol):
    """One simulated environment, which knows neither its horizon nor its index.

    It may have `notices`, a sequence of lines that a run shows when it starts.
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


@dataclass(frozen=True)
class Fault:
    """Something that broke episodes and was survived.

    Attributes:
        kind: The worker died, its simulator raised, it was silent for too long, or a number was not finite; or the
            replay of a resumed run led to another state.
        message: One line for the user: which environments, which episode and step, and why.
    """

    kind: Literal["died", "raised", "timeout", "nonfinite", "replayed"]
    message: str


class ChunkSpan(NamedTuple):
    """When and in which lane of a trace a part of a chunk was simulated, in seconds of `time.perf_counter`."""

    lane: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class ChunkResult:
    """Result of one chunk in each addressed environment. CPU tensors, owned by the caller.

    Every number in it is finite. Where `broken`, the chunk counts for nothing: rewards and `executed` are zero, both
    ends are false, and `obs` and `final_obs` are the first observation of the environment's next episode.

    Attributes:
        obs: [n] observation to decide on next; of the new episode where one ended.
        final_obs: [n] last observation of the chunk's own episode; equals `obs` where none ended. The end of a success,
            from which nothing bootstraps, is not rendered: images and point clouds are those of `obs`. With a history
            it may lack env steps of the chunk before the last one.
        rewards: [n, H] float32, reward of each executed env step, zero after the episode's end.
        executed: [n] int64, env steps executed, 1 to H; 0 where `broken`.
        terminated: [n] bool, the episode ended by itself, by default because the task was solved: nothing follows.
        truncated: [n] bool, the episode was cut at the horizon or sooner; never true where `terminated` is.
        episode_return: [n] float32, undiscounted return of the episode that ended; zero elsewhere.
        episode_length: [n] int64, env steps of the episode that ended; zero elsewhere.
        broken: [n] bool, the episode that the chunk belonged to was lost with its simulator, or had to be given up.
        faults: What was survived since the last result, whichever environments it befell.
        spans: When it was simulated, a worker each.
        succeeded: [n] bool, an episode ended that solved the task; None where `terminated` says so.
    """

    obs: TensorDict
    final_obs: TensorDict
    rewards: Tensor
    executed: Tensor
    terminated: Tensor
    truncated: Tensor
    episode_return: Tensor
    episode_length: Tensor
    broken: Tensor
    faults: tuple[Fault, ...] = ()
    spans: tuple[ChunkSpan, ...] = ()
    succeeded: Tensor | None = None

    @property
    def is_success(self) -> Tensor:
        """[n] bool, an episode ended that solved the task."""
        return self.terminated if self.succeeded is None else self.succeeded


class EnvOrigin(NamedTuple):
    """The recipe that builds environments again.

    Attributes:
        config: The keys of `env`.
        seed: The seed of the run, from which those of construction are derived.
    """

    config: EnvConfig
    seed: int


class VecEnv(ABC):
    """N environments that execute whole chunks and reset themselves; a chunk never crosses an episode.

    One thread uses an instance, but for `interrupt`. Episode e of environment i starts from the seed
    `derive_seed(seed, "episode", i, e)`, whatever happened before.
    """

    spec: EnvSpec
    num_envs: int
    n_action_steps: int | None = None  # actions of a chunk, H; None where the environments do not say
    notices: tuple[str, ...] = ()  # what a run shows when it starts
    origin: EnvOrigin | None = None  # what builds them again; None for environments of a user's own

    @property
    def simulator_spec(self) -> EnvSpec:
        """The spec that the environments can be built from again: `spec`, unless that is in a model's names."""
        return self.spec

    @abstractmethod
    def reset(self, seed: int, journal: EpisodeJournal | None = None) -> TensorDict:
        """Start episode 0 of every environment, or rebuild the open episodes of a journal by replaying their actions.

        Returns the observations to decide on next, [N]. No chunk may be under way. An environment whose worker fails
        meanwhile begins the episode after the one it was to begin or to rebuild; it is not reported as broken.
        """

    @abstractmethod
    def journal(self) -> EpisodeJournal:
        """Return a copy of what would rebuild the open episodes; chunks under way are not in it. Never waits."""

    @abstractmethod
    def step_async(self, actions: Tensor, env_ids: range) -> None:
        """Start one chunk, [n, H, A] within `spec.action_limits`, in each of `env_ids`; returns at once."""

    @abstractmethod
    def step_wait(self, env_ids: range) -> ChunkResult:
        """Wait for the chunk started by `step_async(..., env_ids)`.

        Several `env_ids` may be under way at once if they do not overlap; they may be waited for in any order.
        A simulator that raises, dies, stays silent for too long or is given or yields a number that is not finite
        breaks its episodes, not the call; where a worker has to be replaced, the call waits for it.

        Raises:
            EnvError: Workers had to be replaced too often; the message holds the last one's traceback.
            EnvInterrupted: `interrupt` was called.
        """

    @abstractmethod
    def interrupt(self) -> None:
        """Make this and every later wait for simulators raise `EnvInterrupted`.

        Any thread, a signal handler too; never waits. Only `close` is of use afterwards.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop the simulators and free their memory; may be called twice, and while chunks are under way."""


def start_chunk(env: VecEnv, actions: Tensor, env_ids: range) -> None:
    """Start one chunk of what a policy decided, [n, H, A] on CPU, in each of `env_ids`; returns at once.

    Collecting and evaluation both go through here, so that the same decision is the same action in both. Actions are
    clipped to `spec.action_limits`; what the policy stored of its decision, and log-probs with it, stays unclipped.
    """
    low, high = env.spec.action_limits
    env.step_async(actions.clamp(low, high), env_ids)


def as_slice(env_ids: range) -> slice:
    """Return the rows that a range of environments means in a tensor whose first dimension is N."""
    return slice(env_ids.start, env_ids.stop, env_ids.step)
