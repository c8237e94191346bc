"""Collector: where the trainer gets its rollouts from, inline or from a thread of its own.

A failure of the collector thread is raised in the main thread. `RolloutWriter` collects the rollouts.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

from asyncflow.envs.base import EnvInterrupted
from asyncflow.errors import CollectorError, ConfigError
from asyncflow.rollout.channel import Channel
from asyncflow.rollout.ring import BufferClosed, Rollout
from asyncflow.rollout.streams import collector_stream
from asyncflow.rollout.weights import PublisherClosed
from asyncflow.rollout.writer import RolloutWriter


class Collector(ABC):
    """Source of the trainer's rollouts. The trainer never asks which kind it has.

    Attributes:
        writer: What collects them.
    """

    writer: RolloutWriter

    @abstractmethod
    def start(self) -> None:
        """Begin to collect, if rollouts are collected ahead; called by the trainer, once."""

    @abstractmethod
    def next_rollout(self) -> Rollout:
        """Return the next rollout; called by the trainer, which releases it to the buffer.

        Raises:
            CollectorError: Collecting failed; the cause is the original exception.
            ConfigError: It cannot go on as the user asked, as with an environment that breaks its contract.
            BufferClosed: The buffer was closed on purpose.
        """

    @abstractmethod
    def check(self) -> None:
        """Do nothing while collecting goes well; called by the trainer between minibatches, never waits.

        Raises:
            CollectorError, ConfigError: As `next_rollout`.
        """

    @abstractmethod
    def interrupt(self) -> None:
        """End a wait for simulators, now and later. Any thread or a signal handler; never waits."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until the last rollout that was asked for is written and nothing runs; called by the trainer."""

    @abstractmethod
    def pause(self) -> None:
        """Stop collecting, and wait for the chunks under way, so that others may use the environments.

        Called by the trainer. Rollouts and weights are closed for this collector; another one goes on.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop collecting within one decision; called by the trainer, may be called twice."""


class InlineCollector(Collector):
    """Collects a rollout when it is asked for one, in the caller's thread: synchronous mode (`standard`)."""

    def __init__(self, writer: RolloutWriter, channel: Channel) -> None:
        self.writer, self._buffer, self._clock = writer, channel.buffer, channel.clock

    def start(self) -> None:
        """Nothing is collected ahead."""

    def next_rollout(self) -> Rollout:
        """Collect one; waits for the simulators only."""
        try:
            with self._clock.busy("collector"):
                self.writer.collect_rollout()
        except (BufferClosed, PublisherClosed, EnvInterrupted) as error:
            raise BufferClosed("collecting was stopped") from error
        except ConfigError:
            raise
        except Exception as error:
            raise CollectorError(f"collecting failed: {error}") from error
        return self._buffer.take()

    def check(self) -> None:
        """Nothing runs between two calls of `next_rollout`, so nothing can have failed."""

    def interrupt(self) -> None:
        """End a wait for simulators."""
        self.writer.interrupt()

    def wait(self) -> None:
        """Nothing runs between two calls of `next_rollout`."""

    def pause(self) -> None:
        """Wait for the chunks that an interrupted `next_rollout` left under way."""
        self._buffer.close()
        self.writer.drain()

    def close(self) -> None:
        """Let a `next_rollout` under way end at its next decision."""
        self._buffer.close()


class ThreadedCollector(Collector):
    """Collects in a thread of its own, as far ahead as the ring has slots: asynchronous mode (`vla`)."""

    def __init__(self, writer: RolloutWriter, channel: Channel, num_rollouts: int | None = None) -> None:
        """Make the thread, which ends by itself after `num_rollouts`."""
        self.writer = writer
        self._buffer, self._publisher, self._clock = channel.buffer, channel.publisher, channel.clock
        self._num_rollouts = num_rollouts
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="asyncflow-collector", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def next_rollout(self) -> Rollout:
        """Wait for a finished rollout; woken by the collector thread, also when it fails."""
        try:
            return self._buffer.take()
        except BufferClosed:
            self.check()
            raise

    def check(self) -> None:
        """Raise what the thread raised, if it did."""
        if isinstance(self._error, ConfigError):
            raise self._error
        if self._error is not None:
            said = str(self._error) or type(self._error).__name__
            raise CollectorError(f"the collector thread failed: {said}") from self._error

    def interrupt(self) -> None:
        """End a wait for simulators."""
        self.writer.interrupt()

    def wait(self) -> None:
        """Wait for the thread, which leaves after its last rollout."""
        self._thread.join()

    def pause(self) -> None:
        """Wake the thread, and wait until it has left and no chunk is under way."""
        self._buffer.close()
        self._publisher.close()
        if self._thread.ident is not None:
            self._thread.join()
        self.writer.drain()

    def close(self) -> None:
        """Wake the thread, and wait until the decision under way is finished and the thread has left."""
        self._buffer.close()
        self._publisher.close()
        self.writer.interrupt()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        """Collect until the buffer is closed or the run's last rollout is written. The collector thread's life."""
        num_collected = 0
        try:
            with collector_stream(self._buffer.device), self._clock.busy("collector"):
                while num_collected != self._num_rollouts:
                    self.writer.collect_rollout()
                    num_collected += 1
        except (BufferClosed, PublisherClosed, EnvInterrupted):
            self._buffer.close()  # again: a signal handler's notification may have found nobody waiting yet
        except BaseException as error:  # the main thread raises it
            self._error = error
            self._buffer.close()
