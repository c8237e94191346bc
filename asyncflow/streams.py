"""Ordering of CUDA work between two threads: events, never a device-wide synchronise. On a CPU all of it is a no-op.

Owns the only calls to `torch.cuda` events and streams. It must not know what is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """Return an event at the end of the calling thread's current stream; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def wait_event(event: torch.cuda.Event | None, device: torch.device) -> None:
    """Let the calling thread's current stream wait for `event`; the thread itself does not wait."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)


@contextmanager
def collector_stream(device: torch.device) -> Iterator[None]:
    """Run the block on a high-priority stream of its own, since new threads start on the shared default stream."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device, priority=-1)):
        yield
