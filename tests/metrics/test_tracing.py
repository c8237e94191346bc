"""Spans: collected from any thread, written as a file that is whole at every moment."""

import json
import threading
from collections import Counter

import pytest
from silent import TOY, Silent

from asyncflow.config.presets import load_config
from asyncflow.metrics.tracing import Span, Tracer, read_spans, union_seconds, write_processes
from asyncflow.run.folder import resume_config
from asyncflow.run.launch import resume, train


def span(start_s, end_s, lane="collector", name="collect", **numbers):
    return Span(lane, name, start_s, end_s, numbers)


def test_nothing_is_kept_before_the_file_is_opened(tmp_path):
    tracer = Tracer()
    tracer.add("trainer", "update", 0.0, 1.0)
    tracer.open(tmp_path / "trace.json")
    assert tracer.close() is None
    assert read_spans(tmp_path / "trace.json") == []


def test_spans_come_back_as_they_went(tmp_path):
    tracer = Tracer()
    tracer.open(tmp_path / "trace.json")
    start_s = tracer._start_s
    tracer.add("trainer", "update", start_s + 1.0, start_s + 1.5)
    tracer.add("worker 0", "chunk", start_s + 0.25, start_s + 0.75, rollout=3)
    tracer.close()
    first, second = read_spans(tmp_path / "trace.json")
    assert (first.lane, first.name, first.numbers) == ("worker 0", "chunk", {"rollout": 3})
    assert (second.lane, second.name, second.numbers) == ("trainer", "update", {})
    assert (round(first.start_s, 4), round(first.end_s, 4), round(second.start_s, 4)) == (0.25, 0.75, 1.0)


def test_the_file_is_whole_after_every_flush(tmp_path):
    tracer, path = Tracer(), tmp_path / "trace.json"
    tracer.open(path)
    for count in range(4):
        tracer.flush(at_least=0)  # nothing new
        assert len(read_spans(path)) == count
        tracer.add("trainer", "update", 0.0, 1.0)
        tracer.flush(at_least=0)
        assert len(read_spans(path)) == count + 1


def test_little_is_not_written_yet(tmp_path):
    tracer = Tracer()
    tracer.open(tmp_path / "trace.json")
    tracer.add("trainer", "update", 0.0, 1.0)
    tracer.flush()
    assert not (tmp_path / "trace.json").exists()


def test_a_file_that_cannot_be_written_is_said_once_and_ends_the_trace(tmp_path):
    tracer = Tracer()
    tracer.open(tmp_path / "nowhere" / "trace.json")
    tracer.add("trainer", "update", 0.0, 1.0)
    assert "No such file" in (tracer.flush(at_least=0) or "")
    assert tracer.close() is None


def test_no_span_is_lost_between_threads_and_flushes(tmp_path):
    tracer, num_spans = Tracer(), 2000
    tracer.open(tmp_path / "trace.json")
    has_begun = threading.Event()

    def work():
        for number in range(num_spans):
            tracer.add("collector", "inference", 0.0, 1.0, number=number)
            has_begun.set()

    thread = threading.Thread(target=work)
    thread.start()
    has_begun.wait()
    while thread.is_alive():
        tracer.flush(at_least=0)
    thread.join()
    tracer.close()
    assert [each.numbers["number"] for each in read_spans(tmp_path / "trace.json")] == list(range(num_spans))


def test_every_lane_is_named_once(tmp_path):
    tracer = Tracer()
    tracer.open(tmp_path / "trace.json")
    for lane in ("trainer", "collector", "trainer"):
        tracer.add(lane, "update", 0.0, 1.0)
        tracer.flush(at_least=0)
    tracer.close()
    events = json.loads((tmp_path / "trace.json").read_text())
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == ["trainer", "collector"]


def test_runs_stand_below_each_other_from_time_zero(tmp_path):
    runs = {"standard": [span(5.0, 6.0)], "vla": [span(9.0, 9.5)]}
    write_processes(tmp_path / "trace.json", runs)
    events = json.loads((tmp_path / "trace.json").read_text())
    assert [(e["pid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [(1, 0.0, 1e6), (2, 0.0, 5e5)]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["standard", "vla"]


def test_overlapping_spans_count_once():
    assert union_seconds([span(4.0, 5.0), span(0.0, 2.0), span(1.0, 3.0), span(1.5, 1.6)]) == 4.0
    assert union_seconds([]) == 0.0


@pytest.mark.parametrize("buffer_type", ["standard", "vla"])
def test_every_run_can_write_a_trace_of_its_threads(tmp_path, buffer_type):
    changes = {"logging.trace": True, "logging.out": str(tmp_path / "run"), "trainer.buffer_type": buffer_type}
    train(load_config("toy", TOY | changes), Silent())
    spans = read_spans(tmp_path / "run" / "trace.json")
    assert {span.lane for span in spans} == {"collector", "trainer", "worker 0"}
    counts = Counter(span.name for span in spans)
    assert counts["update"] == counts["publish"] == counts["collect"] == 6
    assert counts["inference"] == counts["chunk"] == 6 * 8


def test_without_being_asked_a_run_writes_no_trace(tmp_path):
    train(load_config("toy", TOY | {"logging.out": str(tmp_path / "run")}), Silent())
    assert not list((tmp_path / "run").glob("trace*"))


def test_a_resumed_run_leaves_the_trace_before_it(tmp_path):
    folder = tmp_path / "run"
    train(load_config("toy", TOY | {"logging.trace": True, "logging.out": str(folder)}), Silent())
    before = (folder / "trace.json").read_bytes()
    resume(folder, resume_config(folder, {"trainer.total_updates": 8}), Silent())
    assert (folder / "trace.json").read_bytes() == before
    assert sum(span.name == "update" for span in read_spans(folder / "trace_000006.json")) == 2
