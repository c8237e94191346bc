"""What the comparison on gymnasium's tasks makes of returns: intervals, verdicts and its page."""

import json
import math
from dataclasses import asdict

import pytest

pytest.importorskip("gymnasium")

import gymnasium

from tools.bench.gym import run
from tools.bench.gym.own import configure
from tools.bench.gym.page import ASYNC, SB3, STANDARD, collect, judge, mean_interval, write_page
from tools.bench.gym.run import DATA, PAGE
from tools.bench.gym.setting import STD, TASKS, TaskSetting, play

MACHINE = {"processor": "A processor", "cores": "2", "memory": "24 GiB"}


def record(learner: str, seed: int, returns: list[float], commit: str = "abc") -> dict:
    result = {"returns": returns, "env_steps": 100, "wall_s": 1.0}
    software = {"commit": commit, "python": "3.11"}
    peers = {"stable-baselines3": "2.9"} if learner == SB3 else {}
    head = {"task": "pendulum", "learner": learner, "seed": seed, "machine": MACHINE, "software": software, "std": 1.0}
    return head | {"peers": peers, "command": "python -m tools.bench.gym", "result": result}


def test_the_interval_over_seeds_is_students() -> None:
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)))
    assert mean_interval([5.0]) == (-math.inf, math.inf)


def test_a_mean_below_the_peers_worst_seed_misses() -> None:
    records = [record(SB3, 0, [-200.0, -100.0]), record(SB3, 1, [-250.0]), record(STANDARD, 0, [-240.0])]
    records += [record(ASYNC, 0, [-200.0]), record(ASYNC, 1, [-302.0])]
    assert collect(records)["pendulum"] == {
        SB3: {0: -150.0, 1: -250.0},
        STANDARD: {0: -240.0},
        ASYNC: {0: -200.0, 1: -302.0},
    }
    standard, threaded = judge(collect(records))
    assert (standard.is_met, threaded.is_met) == (True, False)
    assert (threaded.measured, threaded.target) == ("-251.0", ">= -250.0, the lowest of 2 seeds of stable-baselines3")


def test_the_page_shows_every_learner_each_seed_and_what_was_missed() -> None:
    records = [record(learner, seed, [-100.0 * (1 + seed)]) for learner in (SB3, STANDARD) for seed in range(2)]
    page = write_page([*records, record(ASYNC, 0, [-900.0], commit="def")])
    assert "| Pendulum-v1 | 32,768 | stable-baselines3 | 1 | -150 | -785 to 485 | -100, -200 |" in page
    assert "| Pendulum-v1 | 32,768 | asyncflow, asynchronous | 1 | -900 | -inf to inf | -900 |" in page
    assert "**no**" in page
    assert "- Commit: `abc`, `def`" in page
    assert "- Peer: stable-baselines3 2.9" in page
    assert all(len(line) <= 120 or line.startswith("|") for line in page.splitlines())


def test_the_page_is_that_of_its_records() -> None:
    records = [json.loads(path.read_text()) for path in sorted(DATA.glob("*.json"))]
    assert write_page(records) == PAGE.read_text()


def test_everyone_plays_the_same_episodes() -> None:
    task = TaskSetting("Pendulum-v1", 0, 0.9, 0.001, 64, 2, half_range=2.0)
    seen: list[float] = []
    returns = [play(task, lambda obs: (seen.append(float(obs[0])), obs[:1])[1]) for _ in range(2)]
    assert returns[0] == returns[1]
    assert len(seen) == 2 * 2 * 200
    assert returns[0][0] != returns[0][1]


def test_budgets_are_whole_rollouts() -> None:
    assert all(task.env_steps % (32 * 64) == 0 for task in TASKS.values())


def test_both_get_the_settings_of_the_comparison(tmp_path) -> None:
    config = configure(TASKS["pendulum"], "vla", 3, tmp_path)
    assert config.num_steps == 64
    assert config.buffer.buffer_size // config.algorithm.num_minibatches == TASKS["pendulum"].batch_size
    assert config.trainer.total_updates * config.buffer.buffer_size == TASKS["pendulum"].env_steps
    assert (config.policy.kind, config.policy.n_action_steps, config.trainer.seed) == ("gaussian", 1, 3)


@pytest.mark.parametrize("name", TASKS)
def test_both_explore_alike_at_first(name, tmp_path) -> None:
    """asyncflow's std is that of normalised actions, so the range of an action must be known."""
    task = TASKS[name]
    with gymnasium.make(task.env_id) as env:
        assert (env.action_space.low.tolist(), env.action_space.high.tolist()) == (
            [-task.half_range],
            [task.half_range],
        )
    assert configure(task, "standard", 0, tmp_path).policy.initial_std * task.half_range == pytest.approx(STD)


def test_a_seed_of_other_settings_is_trained_anew(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run, "DATA", tmp_path)
    finished = {"setting": asdict(TASKS["pendulum"]), "std": STD}
    for change, expected in ({}, True), ({"std": 2.0}, False), ({"setting": {}}, False):
        run.record_of("pendulum", SB3, 0).write_text(json.dumps(finished | change))
        assert run.is_finished("pendulum", SB3, 0) == expected
    assert not run.is_finished("pendulum", SB3, 1)
