"""What a profile leaves behind, from legs written by hand."""

import builtins
import csv
import io
import json
from dataclasses import replace

import pytest
from silent import TOY
from written_leg import read

from asyncflow.config.presets import load_config
from asyncflow.metrics.console import ConsoleReporter
from asyncflow.profile.measure import Block, Profile, ProfileOptions, SweepPoint
from asyncflow.profile.report import median_leg, summarise, write_profile, write_sweep

PNG = b"\x89PNG"


def make_profile(groups=1):
    slow, fast = read("standard"), replace(read("vla", lag=1), seconds=16.0)
    legs = [slow, fast, fast, slow]
    if groups > 1:
        legs = [read("serial"), *legs, read("serial")]
    config = load_config("toy", TOY | {"collector.num_env_groups": groups})
    return Profile(config, ProfileOptions(), [Block(legs)] * 2, span_s=1e-6)


@pytest.fixture
def said():
    return io.StringIO()


def write(folder, said, profile=None):
    write_profile(folder, profile or make_profile(), ConsoleReporter(said))
    return json.loads((folder / "profile.json").read_text())


def test_all_files_are_written(tmp_path, said):
    write(tmp_path, said)
    assert {path.name for path in tmp_path.iterdir()} == {"profile.json", "profile.csv", "trace.json", "profile.png"}
    assert (tmp_path / "profile.png").read_bytes().startswith(PNG)


def test_the_json_holds_every_figure_asked_for(tmp_path, said):
    found = write(tmp_path, said)
    assert found["speedup"]["standard"]["value"] == pytest.approx(1.25)
    assert found["ceilings"]["ideal"]["two_stage"] == pytest.approx(10 / 6)
    limits = {kind: limit["two_stage"] for kind, limit in found["ceilings"].items()}
    assert found["reached"] == {"standard": {kind: pytest.approx(1.25 / limit) for kind, limit in limits.items()}}
    assert set(found["modes"]["standard"]["bubbles"]) == {"trainer", "collector", "simulators"}
    assert {"predicted", "alone", "at_work", "advice"} < set(found)
    vla = found["modes"]["vla"]
    assert vla["lags"] == {"1": 8}
    assert vla["decisions"] == {"fresh": 64, "reused": 0, "dropped": 0}
    assert vla["stages"]["chunk"] == {"mean_s": 2.0, "std_s": 0.0, "num": 16}
    assert vla["memory"] == {"process_bytes": 1, "workers_bytes": 2, "gpu_bytes": 3}


def test_the_leg_of_median_speed_is_drawn():
    fast = read("vla")
    legs = [replace(fast, seconds=fast.seconds * factor) for factor in (5.0, 1.0, 1.1)]
    assert median_leg(legs) is legs[2]
    assert median_leg(legs[:2]) is legs[0]


def test_the_csv_has_a_row_for_each_leg(tmp_path, said):
    write(tmp_path, said)
    rows = list(csv.DictReader((tmp_path / "profile.csv").read_text().splitlines()))
    assert [row["mode"] for row in rows] == ["standard", "vla", "vla", "standard"] * 2
    assert float(rows[1]["decisions_per_s"]) == pytest.approx(1.0)


def test_the_terminal_says_what_was_reached_and_gives_one_advice(tmp_path, said):
    write(tmp_path, said)
    lines = said.getvalue().splitlines()
    assert any(
        line.startswith("over standard, two stages\t1.250\t1.250 to 1.250\t1.667 (75.0 % reached)") for line in lines
    )
    assert [line for line in lines if line.startswith("advice: collecting takes 1.5 times as long")]


def test_groups_are_compared_with_the_serial_run_too(tmp_path, said):
    found = write(tmp_path, said, make_profile(groups=2))
    assert set(found["speedup"]) == {"serial", "standard"}
    assert "over serial, three stages" in said.getvalue()


def test_without_matplotlib_everything_else_is_written(tmp_path, said, monkeypatch):
    original = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    write(tmp_path, said)
    assert "no picture: matplotlib is not installed" in said.getvalue()
    assert not (tmp_path / "profile.png").exists()


def test_a_sweep_prints_measured_against_predicted(tmp_path, said):
    write_sweep(tmp_path, [SweepPoint(0.5, make_profile())], ConsoleReporter(said))
    assert "0.5\t0.667\t1.667\t" in said.getvalue()
    rows = list(csv.DictReader((tmp_path / "profile.csv").read_text().splitlines()))
    assert float(rows[0]["measured"]) == pytest.approx(1.25)
    assert (tmp_path / "profile.png").read_bytes().startswith(PNG)


def test_the_summary_is_json():
    summary = summarise(replace(make_profile(), blocks=make_profile().blocks[:1]))  # one block has no interval
    written = json.loads(json.dumps(summary, allow_nan=False))
    assert written["speedup"]["standard"] == {"value": pytest.approx(1.25), "low": None, "high": None}
