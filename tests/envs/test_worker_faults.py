"""Workers that die, hang or raise: replaced, counted, their episodes lost, those of others not."""

import multiprocessing
import os
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fake_simulator import DIE, HANG, RAISE, SUCCEED, ParentSimulator, is_second, make_unreliable
from inline_worker import work_inline
from worker_cases import (
    IDLE,
    SEED,
    H,
    command,
    first_draw,
    is_running,
    kill,
    left_behind,
    make,
    process_of,
    run,
    stop,
)

from asyncflow.envs import worker, workers
from asyncflow.envs.base import ChunkResult
from asyncflow.errors import EnvError


@pytest.fixture(scope="module")
def one_worker():
    with make(1, num_envs=2, max_restarts=100) as vec_env:
        yield vec_env


@pytest.fixture
def survivor(one_worker):
    one_worker.reset(SEED)
    return one_worker


@pytest.fixture
def inline(monkeypatch):
    work_inline(monkeypatch)
    with make(1, num_envs=2, max_restarts=100) as vec_env:
        vec_env.reset(SEED)
        yield vec_env


def assert_broken(result: ChunkResult, first_draws: list[float]) -> None:
    """Check that a result counts for nothing and shows the first observations of episodes."""
    assert result.broken.all()
    for name in ("rewards", "executed", "terminated", "truncated", "episode_return", "episode_length"):
        assert not getattr(result, name).any(), name
    assert result.obs["state"][:, [0, 2]].tolist() == [[draw, 0.0] for draw in first_draws]
    assert torch.equal(result.obs["state"], result.final_obs["state"])


@pytest.mark.parametrize(
    ("kind", "actions", "harm", "cause"),
    [
        ("died", command(HANG, env=1), kill, "died with exit code -9"),
        ("died", command(DIE, env=0), None, "died with exit code 3"),
        ("raised", command(RAISE, env=1), None, "raised ArithmeticError: the fake was told to raise"),
    ],
)
def test_a_worker_that_fails_in_a_chunk_is_replaced_and_its_environments_go_on(survivor, kind, actions, harm, cause):
    assert_replaced(survivor, kind, actions, harm, cause)


class Clock:
    """Time that passes in waits alone: each takes as long as it is asked to, or as the test says."""

    def __init__(self, monkeypatch):
        self.now_s, self.patch = 0.0, monkeypatch
        monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: self.now_s))

    def wait_in_vain(self, until_s, lasts=lambda asked_s: asked_s):
        """Let waits return nothing until a time, and from then on what there is."""

        def wait(objects, timeout_s):
            self.now_s += lasts(timeout_s)
            if self.now_s >= until_s:
                self.patch.setattr(worker, "wait", multiprocessing.connection.wait)
            return []

        self.patch.setattr(worker, "wait", wait)


def test_the_death_of_a_worker_is_seen_though_its_child_lives_on(tmp_path):
    """The child has inherited the worker's end of the channel, which therefore does not close."""
    log = tmp_path / "children"
    with make(1, 2, partial(ParentSimulator, log), max_restarts=1, step_timeout_s=5.0) as vec_env:
        vec_env.reset(SEED)
        faults = run(vec_env, command(DIE, env=0)).faults
    for child in log.read_text().split():
        os.kill(int(child), signal.SIGKILL)
    assert [fault.kind for fault in faults] == ["died"]


def test_a_silent_worker_is_replaced_and_its_environments_go_on(survivor, monkeypatch):
    clock, timeout_s = Clock(monkeypatch), survivor._config.step_timeout_s

    def fall_silent(vec_env):
        stop(vec_env)
        clock.wait_in_vain(timeout_s)

    cause = f"was silent for {timeout_s:g} s (env.step_timeout_s)"
    assert_replaced(survivor, "timeout", command(HANG, env=0), fall_silent, cause)
    assert clock.now_s == timeout_s


def test_time_in_which_the_process_was_stopped_is_not_counted(survivor, monkeypatch):
    """Ctrl-Z stops parent and workers; none of them is to blame for the silence."""
    clock = Clock(monkeypatch)
    survivor.step_async(IDLE, range(2))
    clock.wait_in_vain(1000.0, lasts=lambda asked_s: 1000.0)
    result = survivor.step_wait(range(2))
    assert result.faults == ()
    assert not result.broken.any()


def assert_replaced(survivor, kind, actions, harm, cause):
    """Check that a worker with a chunk under way, and then harmed, is replaced and all goes on."""
    size = survivor.reset(SEED)["state"][:, 1]
    survivor.step_async(actions, range(2))
    old = process_of(survivor)
    if harm:
        harm(survivor)
    result = survivor.step_wait(range(2))
    (fault,) = result.faults
    assert fault.kind == kind
    assert fault.message.startswith(f"worker 0 (environments 0 to 1) {cause}; replaced in ")
    assert_broken(result, [first_draw(0, 1), first_draw(1, 1)])
    assert torch.equal(result.obs["state"][:, 1], size)  # constructed from the same seeds
    assert not is_running(old)
    assert not run(survivor, IDLE).broken.any()


def test_a_lost_episode_counts_and_the_next_ones_follow_their_own_seeds(inline):
    run(inline, command(SUCCEED, env=1))
    assert_broken(run(inline, command(DIE, env=0)), [first_draw(0, 1), first_draw(1, 2)])
    assert inline.journal().episodes == [1, 2]
    result = run(inline, command(SUCCEED, env=0))
    assert result.obs["state"][0, 0] == first_draw(0, 2)
    assert result.episode_length.tolist() == [2, 0]
    assert [len(chunks) for chunks in inline.journal().chunks] == [0, 1]


def test_a_group_whose_chunk_was_lost_with_anothers_learns_it_at_its_own_wait(inline):
    groups = [range(1), range(1, 2)]
    inline.step_async(IDLE[:1], groups[0])
    inline.step_async(command(DIE, env=1)[1:], groups[1])
    first = inline.step_wait(groups[1])
    assert [fault.kind for fault in first.faults] == ["died"]
    second = inline.step_wait(groups[0])  # nobody would answer a wait for the old worker's message
    assert second.faults == ()
    assert_broken(second, [first_draw(0, 1)])
    assert not run(inline, IDLE).broken.any()


def test_a_group_without_a_chunk_under_way_starts_none_in_an_episode_it_has_not_seen(inline):
    run(inline, IDLE)
    run(inline, command(DIE, env=1)[1:], range(1, 2))
    assert_broken(run(inline, command(SUCCEED, env=0)[:1], range(1)), [first_draw(0, 1)])
    assert run(inline, IDLE).obs["state"][:, 2].tolist() == [H, H]


def test_a_worker_that_dies_between_chunks_is_replaced_at_the_next_wait(survivor):
    kill(survivor)
    assert_broken(run(survivor, IDLE), [first_draw(0, 1), first_draw(1, 1)])


def test_a_worker_that_is_dead_at_a_reset_is_replaced_and_reported_later(survivor):
    kill(survivor)
    assert survivor.reset(SEED)["state"][:, 0].tolist() == [first_draw(0, 1), first_draw(1, 1)]
    result = run(survivor, IDLE)
    assert not result.broken.any()
    assert [fault.kind for fault in result.faults] == ["died"]


def test_a_replacement_that_fails_is_another_restart(tmp_path, monkeypatch):
    work_inline(monkeypatch)
    make_simulator = partial(make_unreliable, tmp_path / "log", is_second)
    with make(1, num_envs=1, make_simulator=make_simulator, max_restarts=2) as vec_env:
        vec_env.reset(SEED)
        result = run(vec_env, command(DIE, env=0)[:1], range(1))
        assert [fault.kind for fault in result.faults] == ["died", "raised"]
        assert_broken(result, [first_draw(0, 2)])


def test_more_restarts_than_allowed_end_the_use_with_the_last_traceback():
    keys = r"1 workers failed within env.restart_window_s = 600, more than env.max_restarts = 0"
    with make(1, num_envs=2, max_restarts=0) as vec_env:
        vec_env.reset(SEED)
        vec_env.step_async(command(RAISE, env=1), range(2))
        with pytest.raises(EnvError, match=rf"(?s){keys}.*environments 0 to 1.*Traceback.*the fake was told to raise"):
            vec_env.step_wait(range(2))
        with pytest.raises(EnvError, match="the fake was told to raise"):
            vec_env.reset(SEED)


def test_restarts_are_counted_up_to_the_limit(tmp_path, monkeypatch):
    work_inline(monkeypatch)
    make_simulator = partial(make_unreliable, tmp_path / "log", bool)
    with make(1, num_envs=1, make_simulator=make_simulator, max_restarts=1) as vec_env:
        vec_env.reset(SEED)
        with pytest.raises(EnvError, match=r"(?s)2 workers failed .*OSError: no memory"):
            run(vec_env, command(DIE, env=0)[:1], range(1))


def test_restarts_before_the_window_do_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    work_inline(monkeypatch)
    with make(1, num_envs=2, max_restarts=1, restart_window_s=60.0) as vec_env:
        vec_env.reset(SEED)
        for now[0] in (0.0, 61.0, 122.0):
            assert run(vec_env, command(DIE, env=0)).broken.all()
        now[0] = 181.0
        with pytest.raises(EnvError, match=r"2 workers failed within env.restart_window_s = 60"):
            run(vec_env, command(DIE, env=0))


def test_replaced_workers_leave_neither_process_nor_memory_nor_descriptor(survivor):
    def count():
        processes, *others = left_behind()
        return len(processes), *others

    before = count()
    for harm in (RAISE, DIE):
        run(survivor, command(harm, env=0))
        assert count() == before
