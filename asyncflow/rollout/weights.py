"""WeightPublisher: versioned snapshots of what acting needs and training changes, trainer -> collector.

Weights are the one arrow from the trainer back to the collector. Frozen parameters are shared by both policies and
never copied.

Versions live in `max_policy_lag + 1` snapshots; version v is written over version v - (L + 1), which nobody needs any
more: the rollout that was collected with it was finished before the trainer could produce version v.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from asyncflow.errors import AsyncflowError
from asyncflow.kernels import copy_each
from asyncflow.policies.base import set_eval
from asyncflow.rollout.streams import record_event, wait_event

Module = TypeVar("Module", bound=nn.Module)


class PublisherClosed(AsyncflowError):
    """The publisher was closed while a thread waited for a version."""


class WeightPublisher:
    """Hands weights of an exact version, or the newest, from the training thread to the acting one.

    One thread publishes, one thread leases.
    """

    def __init__(self, policy: nn.Module, max_policy_lag: int) -> None:
        """Allocate the snapshots on the policy's device and publish version 0."""
        changing = changing_tensors(policy)
        self._policy, self._names = policy, list(changing)
        self._device = next(iter(changing.values())).device
        self._num_snapshots = max_policy_lag + 1
        self._snapshots = [[torch.empty_like(s) for s in changing.values()] for _ in range(self._num_snapshots)]
        self._written: list[torch.cuda.Event | None] = [None] * self._num_snapshots
        self._read: list[torch.cuda.Event | None] = [None] * self._num_snapshots
        self._versions = [-1] * self._num_snapshots
        self._leased: int | None = None
        self._is_closed = False
        self._changed = threading.Condition()
        self.publish(0)

    @property
    def newest(self) -> int:
        """The newest published version. Any thread; never waits."""
        return max(self._versions)

    def publish(self, version: int) -> None:
        """Copy the policy's weights into a snapshot as `version`, which must follow the newest.

        Called by the trainer. Waits while the collector leases the snapshot that is to be overwritten; woken by the
        end of that lease. The copy is ordered after the collector's last read by that read's event.
        """
        index = version % self._num_snapshots
        with self._changed:
            self._changed.wait_for(lambda: self._leased != index or self._is_closed)
            self._versions[index] = -1
        wait_event(self._read[index], self._device)
        sources = changing_tensors(self._policy)  # asked anew: a policy may have put another tensor in a buffer's place
        copy_each(self._snapshots[index], list(sources.values()))
        self._written[index] = record_event(self._device)
        with self._changed:
            self._versions[index] = version
            self._changed.notify_all()

    def snapshots(self) -> dict[int, dict[str, Tensor]]:
        """Return the published versions by number, tensors by name. Called by the trainer, which alone writes them."""
        return {
            version: dict(zip(self._names, tensors, strict=True))
            for version, tensors in sorted(zip(self._versions, self._snapshots, strict=True), key=lambda pair: pair[0])
            if version >= 0
        }

    def restore(self, snapshots: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Take over what `snapshots` returned in a run that was cut. Called before the collector starts.

        Nothing else remains, the version that the constructor published included.
        """
        self._versions = [-1] * self._num_snapshots
        for version, tensors in sorted(snapshots.items()):
            index = version % self._num_snapshots
            for name, target in zip(self._names, self._snapshots[index], strict=True):
                target.copy_(tensors[name])
            self._versions[index] = version
            self._written[index] = record_event(self._device)

    @contextmanager
    def lease(self, version: int | None) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield (version, its tensors in the order of `changing_tensors`); None takes the newest.

        Called by the collector. Waits until `version` is published; woken by `publish` or `close`. The tensors may be
        read, on the calling thread's stream, until the block ends.

        Raises:
            PublisherClosed: `close` was called while waiting.
            AsyncflowError: A newer version was written over this one, so that it never comes.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._has(version) or self._is_past(version))
            if self._is_closed:
                raise PublisherClosed
            if not self._has(version):
                held = sorted(each for each in self._versions if each >= 0)
                raise AsyncflowError(f"version {version} of the weights is gone; held are {held}")
            taken = self.newest if version is None else version
            index = self._leased = taken % self._num_snapshots
        wait_event(self._written[index], self._device)
        try:
            yield taken, self._snapshots[index]
        finally:
            self._read[index] = record_event(self._device)
            with self._changed:
                self._leased = None
                self._changed.notify_all()

    def _has(self, version: int | None) -> bool:
        return self.newest >= 0 if version is None else version in self._versions

    def _is_past(self, version: int | None) -> bool:
        return version is not None and version < self.newest and version not in self._versions

    def close(self) -> None:
        """Wake whoever waits. Any thread; may be called twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


def changing_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """Return what training changes by name, in a fixed order: trainable parameters, then buffers."""
    parameters = {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}
    return parameters | dict(policy.named_buffers())


def make_acting_copy(policy: Module) -> Module:
    """Return a copy for the collector: frozen parameters are the same tensors, everything else is its own."""
    shared: dict[int, object] = {id(p): p for p in policy.parameters() if not p.requires_grad}
    acting = copy.deepcopy(policy, shared)
    set_eval(acting)
    return acting
