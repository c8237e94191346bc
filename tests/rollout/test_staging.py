"""Staging: on a CPU nothing happens; elsewhere no buffer is written before the device has read it."""

import threading

import pytest
import torch
from tensordict import TensorDict

from asyncflow.rollout import staging
from asyncflow.rollout.staging import Staging
from asyncflow.rollout.streams import collector_stream

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class LateDevice:
    """A device that copies only when somebody waits for it; an event is a place in its queue."""

    def __init__(self, monkeypatch):
        self.queue, self.num_done, self.buffers = [], 0, []
        for name, function in {
            "_pin": self.pin,
            "_start_upload": self.upload,
            "_start_download": lambda buffer, tensor: self.queue.append(lambda: buffer.copy_(tensor)),
            "record_event": lambda device: len(self.queue),
            "finish_event": lambda event: self.run(event or 0),
        }.items():
            monkeypatch.setattr(staging, name, function)

    def pin(self, like):
        self.buffers.append(torch.full_like(like, 77))
        return self.buffers[-1]

    def upload(self, buffer, device):
        target = torch.full_like(buffer, 99)
        self.queue.append(lambda: target.copy_(buffer))
        return target

    def run(self, until):
        while self.num_done < until:
            self.queue[self.num_done]()
            self.num_done += 1


@pytest.fixture
def late(monkeypatch):
    return LateDevice(monkeypatch)


def test_on_a_cpu_everything_is_passed_on_as_it_is(monkeypatch):
    monkeypatch.setattr(staging, "_pin", lambda like: pytest.fail("a buffer was allocated"))
    lane, noise = Staging(CPU), torch.ones(3, 2)
    rows = TensorDict({"state": torch.ones(3)}, [3])
    assert lane.send("noise", {"noise": noise})["noise"] is noise
    assert lane.send_rows("obs", rows) is rows
    assert lane.fetch(noise) is noise


def test_what_is_sent_arrives_as_it_was_however_late_the_device_copies(late):
    lane = Staging(CUDA)
    sent = [lane.send("obs", {"state": torch.full((3,), float(n))})["state"] for n in range(5)]
    late.run(len(late.queue))
    assert [tensor.tolist() for tensor in sent] == [[float(n)] * 3 for n in range(5)]


def test_nested_rows_arrive_as_they_were_each_through_a_buffer_of_its_own(late):
    lane, sent, expected = Staging(CUDA), [], []
    for n in range(3):
        images = TensorDict({name: torch.full((2, 3), n + i, dtype=torch.uint8) for i, name in enumerate("ab")}, [2])
        expected.append(TensorDict({"state": torch.full((2, 4), float(n)), "images": images}, [2]))
        sent.append(lane.send_rows("obs", expected[-1]))
    late.run(len(late.queue))
    assert all((a == b).all() for a, b in zip(sent, expected, strict=True))
    assert sent[0]["images"].batch_size == expected[0]["images"].batch_size
    assert sent[0]["images", "a"].dtype == torch.uint8
    assert len(late.buffers) == 3


def test_the_first_upload_of_a_buffer_waits_for_nothing(late):
    lane = Staging(CUDA)
    lane.send("obs", {"state": torch.ones(3), "image": torch.ones(3, dtype=torch.uint8)})
    lane.send("noise", {"noise": torch.ones(3)})
    assert late.num_done == 0


def test_the_original_may_be_changed_at_once(late):
    state = torch.ones(3)
    sent = Staging(CUDA).send("obs", {"state": state})["state"]
    state.zero_()
    late.run(1)
    assert sent.tolist() == [1.0] * 3


def test_a_fetch_waits_for_the_device_and_its_result_stays(late):
    lane = Staging(CUDA)
    first = lane.fetch(torch.ones(2))
    second = lane.fetch(torch.zeros(2))
    assert (first.tolist(), second.tolist()) == ([1.0, 1.0], [0.0, 0.0])


def test_buffers_are_allocated_once_and_belong_to_one_purpose(late):
    lane = Staging(CUDA)
    for n in range(4):
        lane.send_rows("obs", TensorDict({"state": torch.full((3,), float(n))}, [3]))
        lane.send_rows("final_obs", TensorDict({"state": torch.full((3,), 10.0 + n)}, [3]))
        lane.fetch(torch.ones(2))
    late.run(len(late.queue))
    assert [buffer.tolist() for buffer in late.buffers] == [[3.0] * 3, [13.0] * 3, [1.0] * 2]


def test_another_shape_or_type_gets_a_buffer_of_its_own(late):
    lane = Staging(CUDA)
    tensors = [torch.ones(3), torch.ones(4), torch.ones(4, dtype=torch.int64)]
    sent = [lane.send("obs", {"state": tensor})["state"] for tensor in tensors]
    late.run(len(late.queue))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(sent, tensors, strict=True))


@pytest.mark.gpu
@needs_cuda
def test_a_busy_stream_reads_what_was_sent_not_what_came_later():
    lane, sent = Staging(CUDA), []

    def send():
        with collector_stream(CUDA):
            for n in range(4):
                torch.cuda._sleep(20_000_000)  # some 10 ms, so that the copy is late
                sent.append(lane.send("obs", {"state": torch.full((100_000,), float(n))})["state"])

    thread = threading.Thread(target=send)
    thread.start()
    thread.join(30)
    assert [(float(x.min()), float(x.max())) for x in sent] == [(float(n), float(n)) for n in range(4)]


@pytest.mark.gpu
@needs_cuda
def test_buffers_are_pinned_and_uploads_do_not_synchronise():
    lane = Staging(CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for n in range(3):
            lane.send("obs", {"state": torch.full((1000,), float(n)), "flags": torch.ones(1000, dtype=torch.bool)})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [buffer.is_pinned() for buffer in lane._buffers.values()] == [True, True]


@pytest.mark.gpu
@needs_cuda
def test_what_is_fetched_is_there_and_in_ordinary_memory():
    lane = Staging(CUDA)
    torch.cuda._sleep(20_000_000)
    fetched = lane.fetch(torch.full((1000,), 3.0, device="cuda"))
    lane.fetch(torch.zeros(1000, device="cuda"))
    assert (fetched == 3.0).all()
    assert not fetched.is_pinned()
