"""Collecting: the ring, the weights and the collector of a trainer, set up, stopped and set up again.

Only this module tells the two buffer types apart. It knows neither how rollouts are trained nor what a run writes.
What was collected ahead when training ends is not kept: the next rollouts are collected again from the journal of the
last update, as a resumed run does.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from torch import Tensor

from asyncflow.config.sections import AlgorithmConfig, BufferType, CompileMode
from asyncflow.devices import check_memory
from asyncflow.envs.base import VecEnv
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.metrics.timing import OverlapClock
from asyncflow.metrics.tracing import Tracer
from asyncflow.policies.base import Policy
from asyncflow.policies.policy_file import check_tensors
from asyncflow.rollout.channel import Channel
from asyncflow.rollout.collector import Collector, InlineCollector, ThreadedCollector
from asyncflow.rollout.plan import RingPlan, plan_ring
from asyncflow.rollout.ring import Rollout, RolloutRing
from asyncflow.rollout.weights import WeightPublisher, changing_tensors
from asyncflow.rollout.writer import CollectorSettings, RolloutWriter
from asyncflow.run.auxiliary import kept_bytes
from asyncflow.run.progress import Progress
from asyncflow.run.state import Books

NUM_OPTIMIZER_COPIES = 5  # Adam's two moments, and what an abandoned update is put back from
NUM_ROLLOUT_COPIES = 2  # what an update trains on, and an epoch's order of it


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the loop: the keys of `buffer`, `collector` and `trainer` with these names.

    Attributes:
        buffer_size: Decisions in a rollout, T * N.
        buffer_type: `vla` collects in a thread while training; `standard` collects, then trains.
        max_policy_lag: Lag limit L in updates; None means 1 for `vla` and 0 for `standard`.
        lag_mode: `fixed`: rollout n acts with version max(0, n - L); `bounded`: with the newest.
        on_full: Whether a collector without a free slot waits or recycles the oldest finished rollout.
        num_env_groups: Groups of environments stepped while others infer.
        seed: Seed of start states and of the policy's noise.
        compile: How the collector's copy of the policy infers.
    """

    buffer_size: int = 960
    buffer_type: BufferType = "vla"
    max_policy_lag: int | None = None
    lag_mode: Literal["fixed", "bounded"] = "fixed"
    on_full: Literal["block", "overwrite"] = "block"
    num_env_groups: int = 1
    seed: int = 0
    compile: CompileMode = "none"

    @property
    def lag(self) -> int:
        """L."""
        if self.max_policy_lag is not None:
            return self.max_policy_lag
        return 1 if self.buffer_type == "vla" else 0

    @property
    def fixed_lag(self) -> int | None:
        """L where every rollout has a version of its own to act with; None where that is the newest."""
        return self.lag if self.lag_mode == "fixed" else None


class Collecting:
    """A trainer's ring, weights and collector. Main thread only, except `stop` and `interrupt`.

    Attributes:
        plan: The ring's plan.
        collector_settings: What the collector is built with.
        clock: Who was busy when, over the trainer's whole life.
        tracer: Where spans go.
    """

    def __init__(self, env: VecEnv, policy: Policy, algorithm: AlgorithmConfig, settings: LoopSettings) -> None:
        """Plan the ring and check that it fits; nothing large is allocated before `open`.

        Raises:
            ConfigError: The policy cannot decide on what the environments show, or memory does not suffice.
        """
        self._env, self._policy, self._settings = env, policy, settings
        self.clock, self.tracer = OverlapClock(), Tracer()
        self._device = next(policy.parameters()).device
        self.plan = self._make_plan(algorithm)
        self.collector_settings = CollectorSettings(
            seed=settings.seed,
            gamma=algorithm.gamma,
            is_success_continued=algorithm.success_value == "continue",
            num_env_groups=settings.num_env_groups,
            max_policy_lag=settings.fixed_lag,
            compile=settings.compile,
        )
        self._channel: Channel | None = None
        self._writer: RolloutWriter | None = None
        self._collector: Collector | None = None
        self._num_left: int | None = None  # rollouts that will still be asked for; None: unknown
        self._can_go_on = False  # whether the writer stands between two rollouts, with nothing collected ahead
        self._restored: tuple[Mapping[int, Mapping[str, Tensor]], Mapping[str, int]] | None = None
        self._source = ""
        self._is_collecting = self._is_stopped = False

    def _make_plan(self, algorithm: AlgorithmConfig) -> RingPlan:
        env, policy, settings = self._env, self._policy, self._settings
        num_slots = settings.lag + 1 if settings.buffer_type == "vla" else 1
        plan = plan_ring(policy, env.spec, env.num_envs, settings.buffer_size // env.num_envs, num_slots)
        snapshots = (settings.lag + 1) * sum(t.nbytes for t in changing_tensors(policy).values())
        trained = NUM_OPTIMIZER_COPIES * sum(p.nbytes for p in policy.parameters() if p.requires_grad)
        rollouts = plan.num_bytes + NUM_ROLLOUT_COPIES * plan.slot_bytes
        kept = kept_bytes(algorithm, policy, plan)
        check_memory(rollouts + snapshots + trained + kept, self._device, "buffer.buffer_size or buffer.max_policy_lag")
        return plan

    @property
    def channel(self) -> Channel:
        """Ring and weights, since `open`; they stay readable after `pause`."""
        if self._channel is None:
            raise ConfigError("nothing was collected yet: the ring is allocated when training begins")
        return self._channel

    @property
    def collector(self) -> Collector:
        """The collector, since `open`."""
        if self._collector is None:
            raise ConfigError("nothing was collected yet: the collector is built when training begins")
        return self._collector

    @property
    def writer(self) -> RolloutWriter:
        """What collects, since `set_up`."""
        if self._writer is None:
            raise ConfigError("nothing was collected yet: the collector is built when training begins")
        return self._writer

    @property
    def is_open(self) -> bool:
        """Whether rollouts can be asked for."""
        return self._is_collecting

    def restore(self, snapshots: Mapping[int, Mapping[str, Tensor]], books: Mapping[str, int], source: str) -> None:
        """Let `open` go on from a checkpoint, and give the policy its newest weights; `source` is its name in errors.

        Raises:
            CheckpointError: The weights do not fit the policy.
        """
        own = changing_tensors(self._policy)
        for version, tensors in snapshots.items():
            check_tensors(own, tensors, f"{source}: version {version} of the weights")
        for name, tensor in snapshots[max(snapshots)].items():
            own[name].copy_(tensor)
        self._restored, self._source = (snapshots, books), source

    def set_up(self, progress: Progress) -> None:
        """Allocate ring and weights and copy the policy, unless that was done; nothing is collected yet.

        Raises:
            CheckpointError: The weights that the next rollouts act with are not there.
            ConfigError: The policy cannot be compiled or captured.
        """
        free_env(self._env, self)
        _USERS[self._env] = weakref.ref(self)
        if not self._can_go_on:
            self.pause()
            self._writer = self._make_writer(progress)
            self._can_go_on = True

    def open(self, progress: Progress, num_rollouts: int | None = None) -> None:
        """Begin to collect, from the boundary after the last update.

        Args:
            progress: How far the run is.
            num_rollouts: How many rollouts will be asked for; None if that is not known.

        Raises:
            CheckpointError, ConfigError: As `set_up`.
        """
        self.set_up(progress)
        assert self._writer is not None  # it was just made
        self._can_go_on, self._is_collecting = False, True
        self._num_left = num_rollouts
        is_waiting = self._settings.on_full == "block"  # else rollouts are dropped, and more are needed
        channel = self.channel
        if self._settings.buffer_type == "standard":
            self._collector = InlineCollector(self._writer, channel)
        else:
            self._collector = ThreadedCollector(self._writer, channel, num_rollouts if is_waiting else None)
        if self._is_stopped:  # before there was a ring to close
            channel.buffer.close()
        self._collector.start()

    def _make_writer(self, progress: Progress) -> RolloutWriter:
        is_new = self._channel is None
        kept = (self.snapshots(), self.books()) if self._restored or not is_new else None
        self._channel = None  # its memory is free before the next ring is allocated
        is_overwriting = self._settings.on_full == "overwrite"
        buffer = RolloutRing(self.plan, self._device, is_overwriting)
        publisher = WeightPublisher(self._policy, self._settings.lag)
        if kept is not None:
            snapshots, books = kept
            publisher.restore(snapshots)
            if (
                not is_new and publisher.newest == progress.updates - 1
            ):  # training failed before it published its last update
                publisher.publish(progress.updates)
            buffer.restore(progress.next_rollout, books)
            self._check_versions(publisher, progress.updates)
        self._channel, self._restored = Channel(buffer, publisher, self.clock, self.tracer), None
        return RolloutWriter(self._env, self._policy, self._channel, self.collector_settings, progress.journal)

    def _check_versions(self, publisher: WeightPublisher, updates: int) -> None:
        """Refuse to wait for ever for versions that are lost."""
        lag = self._settings.fixed_lag or 0
        missing = set(range(max(0, updates - lag), updates + 1)) - publisher.snapshots().keys()
        if missing:
            versions = ", ".join(str(version) for version in sorted(missing))
            raise CheckpointError(
                f"{self._source or 'the trainer'}: lacks the weights of version {versions}, with which the run goes on"
            )

    def next_rollout(self) -> Rollout:
        """Return the next rollout; see `Collector.next_rollout`."""
        rollout = self.collector.next_rollout()
        if self._num_left is not None:
            self._num_left -= 1
        return rollout

    def books(self) -> Mapping[str, int]:
        """Return where all decisions went, without those that are given up when training goes on from here."""
        if self._channel is not None:
            return self._channel.buffer.settled_books()
        return self._restored[1] if self._restored else asdict(Books())

    def snapshots(self) -> Mapping[int, Mapping[str, Tensor]]:
        """Return the versions of the weights with which the next rollouts act."""
        if self._channel is not None:
            return self._channel.publisher.snapshots()
        return self._restored[0] if self._restored else {0: changing_tensors(self._policy)}

    def check(self) -> None:
        """Raise what ended the collector thread, if something did; never waits."""
        if self._collector is not None:
            self._collector.check()

    def finish(self) -> None:
        """End collecting once training has ended as planned; what was collected ahead is given up. Never waits."""
        is_ahead = self._settings.buffer_type == "vla" and (
            self._num_left != 0 or self._settings.on_full == "overwrite"
        )
        self._is_collecting = False
        if self._is_stopped or is_ahead:
            self.stop()
        elif self._writer is not None:
            self.collector.wait()  # for a thread that has written its last rollout
            self._can_go_on = True

    def allow(self) -> None:
        """Forget a `stop`: `open` collects again."""
        self._is_collecting = self._is_stopped = False

    def stop(self) -> None:
        """Let collecting end with the chunk under way. Any thread or a signal handler; never waits."""
        self._is_stopped = True
        if self._channel is not None:
            self._channel.buffer.close()
            self._channel.publisher.close()

    def interrupt(self) -> None:
        """End every wait for simulators and for rollouts, for good. Any thread or a signal handler; never waits."""
        self.stop()
        self._env.interrupt()

    def pause(self) -> None:
        """Stop collecting, and wait until the chunk under way has ended: the environments are free for others then."""
        if self._writer is not None and self._collector is not None:
            self._collector.pause()
        self._writer = None
        self._can_go_on = self._is_collecting = False

    def close(self) -> None:
        """Stop collecting, whatever is waited for; waits for the thread."""
        if self._collector is not None:
            self._collector.close()
        self._writer = None


_USERS: weakref.WeakKeyDictionary[VecEnv, weakref.ref[Collecting]] = weakref.WeakKeyDictionary()


def free_env(env: VecEnv, user: Collecting | None = None) -> None:
    """Let whoever else than `user` collects in `env` leave it; its episodes are rebuilt when it collects again."""
    reference = _USERS.get(env)
    other = None if reference is None else reference()
    if other is not None and other is not user:
        other.pause()
