"""Staging: how tensors cross between ordinary memory and a CUDA device, through pinned buffers that are kept.

This file keeps the buffers and decides when each may be written again. On a CPU every tensor is passed on as it is: no
copy, no buffer.

A copy to or from pageable memory makes the calling thread wait for the device. One to or from pinned memory runs when
the stream gets there, so that its memory must be left alone until then. Which event orders what:

    event      recorded after                     waited for by
    uploaded   the copies of one `send`           the host, before one of these buffers is written again
    fetched    the copy of one `fetch`            the host, before the buffer is read

Both are recorded on the caller's current stream, the collector's. What is queued there later, inference and writing to
the ring, comes after an upload by the order of the stream itself and needs no event. In a run the wait for `uploaded`
never lasts: between two uploads of a group its actions were fetched, which is later on the same stream.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from tensordict import TensorDict
from torch import Tensor

from asyncflow.rollout.streams import finish_event, record_event

Name = TypeVar("Name", bound=Hashable)


class Staging:
    """The pinned buffers of one group of environments, allocated at first use. One thread uses an instance."""

    def __init__(self, device: torch.device) -> None:
        """Allocate nothing yet: what is staged tells its own shapes."""
        self._device = device
        self._buffers: dict[Hashable, Tensor] = {}
        self._uploaded: dict[Hashable, torch.cuda.Event | None] = {}

    def send(self, purpose: str, tensors: Mapping[Name, Tensor]) -> dict[Name, Tensor]:
        """Return the tensors on the device, for work on the caller's stream; the originals may be changed at once.

        Args:
            purpose: What they are for; together with their names it finds the buffers.
            tensors: In ordinary memory, by name; of the same shapes every time.
        """
        if self._device.type != "cuda":
            return dict(tensors)
        names = {name: (purpose, name) for name in tensors}
        sent = {name: self._upload(names[name], tensor) for name, tensor in tensors.items()}
        self._uploaded |= dict.fromkeys(names.values(), record_event(self._device))
        return sent

    def send_rows(self, purpose: str, rows: TensorDict) -> TensorDict:
        """Send a batch of rows, nested ones included, like `send`; on a CPU it returns `rows` themselves."""
        if self._device.type != "cuda":
            return rows
        sent = TensorDict({}, rows.batch_size)
        for name, tensor in self.send(purpose, dict(_leaves(rows))).items():
            sent[name] = tensor
        return sent

    def fetch(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the device in ordinary memory, the caller's own. Waits for the device."""
        if self._device.type != "cuda":
            return tensor
        buffer = self._buffer("fetched", tensor)
        _start_download(buffer, tensor)
        finish_event(record_event(self._device))  # sync: the caller asked for the numbers
        return buffer.clone()  # whoever keeps it, keeps it: the buffer is written again

    def _upload(self, name: Hashable, tensor: Tensor) -> Tensor:
        buffer = self._buffer(name, tensor)
        finish_event(self._uploaded.get(name))  # sync: with the buffer's own last copy only, which is long done
        buffer.copy_(tensor)
        return _start_upload(buffer, self._device)

    def _buffer(self, name: Hashable, like: Tensor) -> Tensor:
        """Return the pinned buffer of a name; one of another shape is replaced, and freed once it was copied."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = self._buffers[name] = _pin(like)
        return buffer


def _leaves(rows: Any) -> Iterator[tuple[Any, Tensor]]:
    """Return (name, tensor) of the fields; the name of a nested one is a tuple."""
    return iter(rows.items(include_nested=True, leaves_only=True))


def _pin(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def _start_upload(buffer: Tensor, device: torch.device) -> Tensor:
    return buffer.to(device, non_blocking=True)


def _start_download(buffer: Tensor, tensor: Tensor) -> None:
    buffer.copy_(tensor, non_blocking=True)
