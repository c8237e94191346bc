"""Events and streams: nothing on a CPU, and no wait for what is over."""

import threading

import pytest
import torch

from asyncflow.rollout.streams import COLLECTOR_PRIORITY, collector_stream, finish_event, record_event, wait_event

CPU = torch.device("cpu")


class Event:
    """An event that keeps what is asked of it."""

    def __init__(self, is_over):
        self.is_over, self.calls = is_over, []

    def query(self):
        self.calls.append("query")
        return self.is_over

    def synchronize(self):
        self.calls.append("synchronize")


@pytest.mark.parametrize(("is_over", "calls"), [(True, ["query"]), (False, ["query", "synchronize"])])
def test_the_thread_waits_only_for_an_event_that_is_not_over(is_over, calls):
    event = Event(is_over)
    finish_event(event)
    assert event.calls == calls


def test_on_a_cpu_there_are_no_events():
    assert record_event(CPU) is None
    assert wait_event(None, CPU) is None
    assert finish_event(None) is None
    with collector_stream(CPU) as entered:
        assert entered is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_collectors_stream_is_its_own_and_finished_when_it_is_left():
    device, seen = torch.device("cuda", 0), []

    def work():
        with collector_stream(device):
            torch.cuda._sleep(20_000_000)  # some 10 ms
            seen.append(torch.cuda.current_stream(device))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert seen[0] != torch.cuda.default_stream(device)
    assert seen[0].priority == COLLECTOR_PRIORITY
    assert seen[0].query()
