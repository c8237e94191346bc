"""The VecEnv contract: what the collector and the evaluation ask of a set of environments.

The contract holds for every environment, however it is simulated and whoever acts in it.

Shapes: N environments, n of them addressed by one call, H executed actions of a chunk, A action size, D size of the
`state` observation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

from tensordict import TensorDict
from torch import Tensor

from asyncflow.config.sections import EnvConfig
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.errors import EnvError
from asyncflow.simulators.spec import EnvSpec


class EnvInterrupted(EnvError):
    """`VecEnv.interrupt` was called while a thread waited for simulators, or before it did."""


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
    versions: Mapping[str, str] = MappingProxyType({})  # of Python and packages that simulate, where that is known
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
