"""The stress suite in short: every part runs on a small scale, and notices what it is there to notice."""

import random
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from asyncflow.rollout.ring import RolloutSlot
from tools.stress import cuts as stress_cuts
from tools.stress import faults as stress_faults
from tools.stress import ring as stress_ring
from tools.stress import run as stress
from tools.stress import weights as stress_weights
from tools.stress.report import Row, page

FAILED = Row("a fault", 3, "a decision", "nothing", ("it did not hold",))


def failures(rows):
    return [failure for row in rows for failure in row.failures]


def test_no_lease_is_torn_or_of_another_version():
    rows = stress_weights.hunt_torn_weights(100, seed=0)
    assert [row.times for row in rows] == [500, 500]
    assert not failures(rows)


def test_the_hunt_notices_torn_weights(monkeypatch):
    hunt = stress_weights.Hunt(lag=0, num_leases=1, seed=0, is_exact=True)

    def overwrite_what_is_leased(delays):
        for tensor in hunt._publisher._snapshots[0]:
            tensor.fill_(7)

    monkeypatch.setattr(stress_weights, "_pause", overwrite_what_is_leased)  # between the reads of two tensors
    hunt._lease(0, random.Random(0))
    assert hunt.checks.failures == ["L = 0: torn: version 0 holds {0.0, 7.0}"]


def test_rollouts_pass_the_ring_in_order_once_and_whole():
    rows = stress_ring.race_through_ring(1_500, seed=0)
    assert sum(row.times for row in rows) == 1_500
    assert not failures(rows)


def test_the_race_notices_a_row_of_another_rollout(monkeypatch):
    add = RolloutSlot.add

    def add_late(self, t, env_ids, obs, decision):
        add(self, t, env_ids, obs, decision | {"ticket": decision["ticket"] - 8})

    monkeypatch.setattr(RolloutSlot, "add", add_late)
    race = stress_ring.RingRace(stress_ring.KINDS[0], 3, seed=0)
    race.run()
    assert "rollout 0 holds other rows than were written" in race.checks.failures


@pytest.mark.slow
def test_a_run_survives_a_killed_worker_counts_it_and_leaves_no_process(tmp_path):
    assert not stress_faults.kill_workers(tmp_path, times=1, seed=0).failures


def test_shared_memory_that_is_left_behind_is_noticed(monkeypatch):
    monkeypatch.setattr(stress_faults, "shared_memory", lambda: {"old", "new"})
    assert stress_faults.check_nothing_is_left({"old"}).failures == ("/dev/shm holds ['new']",)
    assert stress_faults.check_nothing_is_left({"old", "new", "gone"}).failures == ()


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_equals_the_uncut_one(tmp_path):
    lane = stress_cuts.Lane(tmp_path / "cut", tmp_path / "uncut", start_s=1.0)
    with ThreadPoolExecutor(1) as pool:
        uncut = pool.submit(stress_cuts.run_uncut, tmp_path / "uncut")
        assert lane.cut(lane.launch(), stress_cuts.Cut("saving", 0.5, signal.SIGKILL))
        uncut.result()
    lane.cut_often([])  # the resume
    assert not failures(stress_cuts.report_cuts([lane]))


def test_a_failed_row_stands_on_the_page():
    text = page([Row("this", 1, "nothing", "all"), FAILED], seed=0, minutes=1.0).text()
    assert "**This run failed: 1 of 2 rows.**" in text
    assert "| a fault | 3 | a decision | nothing | **no**: it did not hold |" in text


@pytest.mark.parametrize(("rows", "code"), [([], 0), ([FAILED], 1)])
def test_a_failed_check_is_exit_code_1_and_said_aloud(tmp_path, monkeypatch, capsys, rows, code):
    monkeypatch.setattr(stress, "run_parts", lambda *_: rows)
    monkeypatch.setattr(sys, "argv", ["stress.py", "--page", str(tmp_path / "page.md")])
    assert stress.main() == code
    assert (tmp_path / "page.md").exists()
    assert ("FAILED" in capsys.readouterr().out) == bool(code)


def test_a_part_alone_or_a_cut_writes_no_page(tmp_path, monkeypatch):
    target = ["stress.py", "--page", str(tmp_path / "page.md")]
    monkeypatch.setattr(stress, "run_parts", lambda *_: [])
    monkeypatch.setattr(sys, "argv", [*target, "--part", "ring"])
    assert stress.main() == 0

    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stress, "run_parts", cut)
    monkeypatch.setattr(sys, "argv", target)
    with pytest.raises(KeyboardInterrupt):
        stress.main()
    assert not (tmp_path / "page.md").exists()


def test_a_part_that_breaks_is_a_failed_row(tmp_path, monkeypatch):
    monkeypatch.setitem(stress.PARTS, "disk", lambda folder, seed: 1 / 0)
    rows = stress.run_parts(["disk"], tmp_path, seed=0)
    assert failures(rows) == ["the part broke: ZeroDivisionError: division by zero"]
