"""What a run counts, and which checkpoint is its best: through faults, failed saves, cuts and resumed runs."""

import itertools
from dataclasses import replace

import pytest
import torch
from full_disk import fail_to_save
from silent import TOY, assert_equal, go_on, outcome, start

from asyncflow.envs.base import Fault
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.ppo.ppo import PPO
from asyncflow.run import recorded
from asyncflow.run.checkpoint import list_checkpoints, load_checkpoint, point_at
from asyncflow.run.evaluate import EvalResult
from asyncflow.run.progress import Progress

EARLY = {(0, 0): "died", (1, 0): "timeout", (2, 0): "nonfinite"}  # (environment, episode) -> the fault that breaks it
LATE = {(3, 1): "raised"}


def break_episodes(monkeypatch, faults):
    """Break the toy's episodes that `faults` names at their second decision, in runs that go on, too."""
    step_async, step_wait = ToyVecEnv.step_async, ToyVecEnv.step_wait

    def spoil(env, actions, env_ids):
        journal = env.journal()
        doomed = [bool((i, journal.episodes[i]) in faults and journal.chunks[i]) for i in env_ids]
        step_async(env, torch.where(torch.tensor(doomed)[:, None, None], torch.nan, actions), env_ids)

    def tell(env, env_ids):
        episodes = env.journal().episodes
        result = step_wait(env, env_ids)
        broken = [(i, episodes[i]) for i, is_broken in zip(env_ids, result.broken.tolist(), strict=True) if is_broken]
        return replace(result, faults=tuple(Fault(faults[key], f"broken: {key}") for key in broken))

    monkeypatch.setattr(ToyVecEnv, "step_async", spoil)
    monkeypatch.setattr(ToyVecEnv, "step_wait", tell)


def record_rollouts(monkeypatch):
    """Return a list that fills with `valid` and `executed` of every rollout that is trained on."""
    update, seen = PPO.update, []

    def record(self, rollout, *arguments):
        seen.append((rollout.data["valid"].clone(), rollout.data["executed"].clone()))
        return update(self, rollout, *arguments)

    monkeypatch.setattr(PPO, "update", record)
    return seen


@pytest.mark.parametrize("buffer_type", ["standard", "vla"])
def test_only_valid_decisions_are_counted_as_trained(tmp_path, monkeypatch, buffer_type):
    break_episodes(monkeypatch, EARLY | LATE)
    rollouts = record_rollouts(monkeypatch)
    row = start(tmp_path / "run", "toy", TOY | {"trainer.buffer_type": buffer_type}).rows[-1]
    num_invalid = sum(int((~valid).sum()) for valid, _ in rollouts)
    assert num_invalid == 8  # the broken decisions and the one before each of them
    assert row["decisions"] == row["buffer/trained"] == 6 * 32 - num_invalid
    assert row["buffer/invalid"] == num_invalid
    assert row["env_steps"] == sum(int(executed[valid].sum()) for valid, executed in rollouts)
    assert row["env_steps"] < sum(int(executed.sum()) for _, executed in rollouts)


def test_what_was_survived_is_counted_by_kind(tmp_path, monkeypatch):
    break_episodes(monkeypatch, EARLY | LATE)
    row = start(tmp_path / "run", "toy", TOY).rows[-1]
    assert row["health/worker_restarts"] == 3  # died, timeout, raised
    assert row["health/env_timeouts"] == 1
    assert row["health/nonfinite_episodes"] == 1


def test_every_fault_is_told_once(tmp_path, monkeypatch):
    break_episodes(monkeypatch, EARLY | LATE)
    notices = start(tmp_path / "run", "toy", TOY).notices
    assert sorted(notices) == sorted(f"broken: {key}" for key in EARLY | LATE)


@pytest.mark.parametrize("buffer_type", ["standard", "vla"])
def test_a_cut_run_with_broken_episodes_equals_the_uncut_one(tmp_path, monkeypatch, buffer_type):
    break_episodes(monkeypatch, EARLY | LATE)
    changes = TOY | {"trainer.buffer_type": buffer_type, "collector.num_env_groups": 2}
    start(tmp_path / "uncut", "toy", changes)
    start(tmp_path / "cut", "toy", changes, stop_at=1)
    cut = load_checkpoint(list_checkpoints(tmp_path / "cut")[-1])
    assert sum(cut.state.faults.values()) == len(EARLY)
    go_on(tmp_path / "cut")
    assert_equal(outcome(tmp_path / "uncut"), outcome(tmp_path / "cut"))


def test_skipped_minibatches_are_counted_on_after_a_cut(tmp_path):
    trainers = []

    def skip_three(built):
        built.trainer.ppo.num_nonfinite_steps = 3

    start(tmp_path / "run", "toy", TOY, 2, skip_three)
    go_on(tmp_path / "run", trainers.append)
    assert trainers[0].trainer.ppo.num_nonfinite_steps == 3


def test_the_wall_clock_goes_on_after_a_cut(tmp_path):
    def pretend_to_be_old(built):
        built.trainer.row["wall_s"] = 1e6

    start(tmp_path / "run", "toy", TOY, 2, pretend_to_be_old)
    rows = go_on(tmp_path / "run").rows
    assert all(1e6 < row["wall_s"] < 1e6 + 600 for row in rows)


EVALUATED = TOY | {"trainer.eval_interval": 1, "trainer.eval_episodes": 4, "trainer.save_interval": 1}


def script_success(monkeypatch, rates):
    """Let the evaluations of a run find these success rates, one after another."""
    remaining = iter(rates)

    def find(*_):
        return EvalResult(4, 0, next(remaining), 0.0, 1.0, 10.0, 0.0, 0.0)

    monkeypatch.setattr(recorded, "evaluate", find)


def best_of(folder):
    return (folder / "checkpoints" / "best").resolve().name


def names_of(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    start(tmp_path / "run", "toy", TOY | {"trainer.save_interval": 1, "trainer.keep_last": 2})
    assert names_of(tmp_path / "run") == ["update_000005", "update_000006"]


def test_the_best_checkpoint_outlives_worse_and_newer_ones(tmp_path, monkeypatch):
    script_success(monkeypatch, [0.9, 0.2, 0.8, 0.5, 0.8, 0.1, 0.7])  # the first is that of update 0, saved by nobody
    start(tmp_path / "run", "toy", EVALUATED | {"trainer.keep_last": 2})
    assert best_of(tmp_path / "run") == "update_000002"
    assert names_of(tmp_path / "run") == ["update_000002", "update_000005", "update_000006"]


def test_an_update_that_is_the_best_so_far_is_saved_out_of_turn(tmp_path, monkeypatch):
    script_success(monkeypatch, [0.0, 0.2, 0.1, 0.5, 0.3, 0.1, 0.1])
    start(tmp_path / "run", "toy", EVALUATED | {"trainer.save_interval": 100})
    assert names_of(tmp_path / "run") == ["update_000001", "update_000003", "update_000006"]


def test_a_best_update_that_could_not_be_saved_gives_way_to_a_worse_one(tmp_path, monkeypatch):
    fail_to_save(monkeypatch, updates=2)
    script_success(monkeypatch, [0.0, 0.2, 0.9, 0.1, 0.5, 0.3, 0.4])
    start(tmp_path / "run", "toy", EVALUATED)
    assert best_of(tmp_path / "run") == "update_000004"


def test_a_resumed_run_remembers_how_good_the_best_one_was(tmp_path, monkeypatch):
    script_success(monkeypatch, itertools.chain([0.0, 0.2, 0.8], itertools.repeat(0.5)))
    start(tmp_path / "run", "toy", EVALUATED, stop_at=4)
    go_on(tmp_path / "run")
    assert best_of(tmp_path / "run") == "update_000002"


def test_a_resumed_run_moves_the_link_that_a_killed_one_did_not(tmp_path, monkeypatch):
    script_success(monkeypatch, itertools.chain([0.0, 0.2, 0.8], itertools.repeat(0.5)))
    start(tmp_path / "run", "toy", EVALUATED, stop_at=3)
    point_at(tmp_path / "run", "best", tmp_path / "run" / "checkpoints" / "update_000001")
    go_on(tmp_path / "run")
    assert best_of(tmp_path / "run") == "update_000002"


def test_the_first_evaluation_is_the_best_so_far_however_low_its_return_is():
    assert Progress(updates=4).is_best(-1200.0)
    assert not Progress(updates=8, best_success=-1200.0, best_update=4).is_best(-1300.0)
