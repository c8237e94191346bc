"""One name everywhere: glossary, JSON lines, TensorBoard, page."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from asyncflow.metrics import GLOSSARY, MetricLogger, glossary_markdown, is_timing

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"


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
