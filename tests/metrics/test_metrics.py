"""One name everywhere: glossary, JSON lines, TensorBoard, page."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from full_disk import full_disk

from asyncflow.errors import ConfigError
from asyncflow.metrics.glossary import GLOSSARY, MetricLogger, glossary_markdown, is_timing

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def write(folder: Path, *rows: dict[str, float], logger: str = "none") -> list[dict[str, float | None]]:
    metrics = MetricLogger(folder, logger)  # type: ignore[arg-type]
    for row in rows:
        metrics.write(row)
    metrics.close()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_row_becomes_one_json_line(tmp_path: Path) -> None:
    rows = [{"env_steps": 64, "updates": 1, "train/entropy": 0.5}, {"env_steps": 128, "updates": 2}]
    assert write(tmp_path, *rows) == rows


def test_a_row_is_on_disk_before_the_next(tmp_path: Path) -> None:
    metrics = MetricLogger(tmp_path, "none")
    metrics.write({"env_steps": 1})
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    metrics.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path: Path, value: float) -> None:
    assert write(tmp_path, {"env_steps": 1, "train/grad_norm": value})[0]["train/grad_norm"] is None


def test_an_unknown_name_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    metrics = MetricLogger(tmp_path, "none")
    with pytest.raises(ValueError, match="train/policy_lose"):
        metrics.write({"env_steps": 1, "train/policy_lose": 0.0})
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_row_without_its_clock_is_refused(tmp_path: Path) -> None:
    metrics = MetricLogger(tmp_path, "none")
    with pytest.raises(ValueError, match="env_steps"):
        metrics.write({"updates": 1})
    metrics.close()


def test_tensorboard_has_the_same_names_at_env_steps(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, {"env_steps": 640, "rollout/success_rate": 0.25, "train/entropy": math.nan}, logger="tensorboard")
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"env_steps", "rollout/success_rate"}
    [scalar] = events.Scalars("rollout/success_rate")
    assert (scalar.step, scalar.value) == (640, 0.25)


def test_no_tensorboard_files_without_the_logger(tmp_path: Path) -> None:
    write(tmp_path, {"env_steps": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    return [(scalar.step, scalar.value) for scalar in events.Scalars(name)]


def rows(*updates: int) -> list[dict[str, float]]:
    return [{"env_steps": 100 * k, "updates": k} for k in updates]


def test_a_full_disk_is_reported_and_costs_no_row(tmp_path: Path) -> None:
    metrics = MetricLogger(tmp_path, "tensorboard")
    first, second, third = rows(1, 2, 3)
    assert metrics.write(first) == []
    with full_disk(tmp_path):
        for num_waiting, row in enumerate((second, third), start=1):
            assert metrics.write(row) == [
                f"{name}: File too large; rows waiting: {num_waiting}" for name in ("metrics.jsonl", "TensorBoard")
            ]
    fourth = rows(4)[0]
    assert metrics.write(fourth) == []
    assert metrics.close() == []
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [first, second, third, fourth]
    assert scalars(tmp_path, "updates") == [(100, 1.0), (200, 2.0), (300, 3.0), (400, 4.0)]


def test_rows_that_wait_are_written_at_the_end(tmp_path: Path) -> None:
    metrics = MetricLogger(tmp_path, "none")
    with full_disk(tmp_path):
        metrics.write(rows(1)[0])
    assert metrics.close() == []
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == rows(1)[0]


def test_rows_that_are_lost_at_the_end_are_reported_and_nothing_is_raised(tmp_path: Path) -> None:
    metrics = MetricLogger(tmp_path, "none")
    with full_disk(tmp_path):
        metrics.write(rows(1)[0])
        assert metrics.close() == ["metrics.jsonl: File too large; rows lost: 1"]
    assert metrics.close() == []


def test_a_resumed_run_removes_the_rows_after_its_checkpoint_and_goes_on(tmp_path: Path) -> None:
    write(tmp_path, *rows(1, 2, 3), logger="tensorboard")
    resumed = MetricLogger(tmp_path, "tensorboard", updates=1)
    resumed.write({"env_steps": 250, "updates": 2.5})
    resumed.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["updates"] for line in lines] == [1, 2.5]
    assert scalars(tmp_path, "updates") == [(100, 1.0), (250, 2.5)]


def test_a_run_resumed_before_its_first_row_begins_anew(tmp_path: Path) -> None:
    write(tmp_path, *rows(1, 2), logger="tensorboard")
    resumed = MetricLogger(tmp_path, "tensorboard", updates=0)
    resumed.write({"env_steps": 90, "updates": 1})
    resumed.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"env_steps": 90, "updates": 1}
    assert scalars(tmp_path, "updates") == [(90, 1.0)]


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics.jsonl: No such file or directory$"):
        MetricLogger(tmp_path / "missing", "none")


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    metrics = MetricLogger(tmp_path, "none")
    metrics.close()
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_two_equal_runs_differ_only_in_timing_names() -> None:
    timing = {name for name in GLOSSARY if is_timing(name)}
    assert {"wall_s", "time/update_s", "async/overlap", "health/rss_bytes", "buffer/in_flight"} <= timing
    assert timing.isdisjoint({"env_steps", "train/policy_loss", "staleness/policy_lag_mean", "buffer/trained"})


@pytest.mark.parametrize("name", GLOSSARY)
def test_every_metric_is_explained(name: str) -> None:
    assert GLOSSARY[name].meaning.endswith(".")
    if name.endswith(("_s", "_bytes")) and not name.endswith("per_s"):
        assert GLOSSARY[name].unit in ("s", "bytes")


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == glossary_markdown(), "run `make docs`"
