"""Ordering of CUDA work between two threads: events, never a device-wide synchronise. On a CPU all of it is a no-op.

No other file calls `torch.cuda` events, streams or graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")

COLLECTOR_PRIORITY = -1  # before the trainer's: its kernels are short, and simulators wait for them
NUM_CAPTURE_WARMUPS = 3  # as torch's own: libraries set themselves up in the first calls, which cannot be captured


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


def finish_event(event: torch.cuda.Event | None) -> None:
    """Let the calling thread wait for `event`, outside the interpreter's lock, which is kept if it is over already."""
    if event is not None and not event.query():
        event.synchronize()


@contextmanager
def collector_stream(device: torch.device) -> Iterator[None]:
    """Run the block on a high-priority stream of its own, since new threads start on the shared default stream.

    At the block's end the thread waits for what it has queued, so that the memory which that uses may be freed.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device, priority=COLLECTOR_PRIORITY)
    with torch.cuda.stream(stream):
        try:
            yield
        finally:
            stream.synchronize()  # sync: once, when the collector's thread ends


def capture_graph(run: Callable[[], Result], device: torch.device) -> tuple[Result, Callable[[], None]]:
    """Capture what `run` does on a CUDA device.

    Called where nothing else uses the device: capturing synchronises with all of it. The graph may then be replayed by
    any thread, on its current stream. It reads and writes the very tensors that `run` did: results are overwritten by
    every replay, and tensors that `run` read are read as they are then.

    Args:
        run: Reads nothing back from the device, and branches on nothing that changes. It is called several times.
        device: Where.

    Returns:
        What `run` returned, filled only by a replay, and what replays.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device, priority=COLLECTOR_PRIORITY)  # kernels of a graph keep that of the capture
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(NUM_CAPTURE_WARMUPS):
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Another thread's allocations, should there be any, must not break the capture: hence not the global mode.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = run()
    return result, graph.replay
