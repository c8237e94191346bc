"""Simulators in processes: same transitions for every layout, errors in time, nothing left behind."""

import multiprocessing
import os
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from fake_simulator import DIE, HANG, RAISE, SUCCEED, FakeSimulator

from asyncflow.config import EnvConfig
from asyncflow.envs.base import ChunkResult
from asyncflow.envs.workers import WorkerVecEnv, _intersect
from asyncflow.errors import EnvError

N, H, SEED = 5, 4, 3


def make(num_workers: int, num_envs: int = N, make_simulator=FakeSimulator) -> WorkerVecEnv:
    return WorkerVecEnv(make_simulator, EnvConfig(num_workers=num_workers, step_timeout_s=1.0), num_envs, H, SEED)


@pytest.fixture(scope="module")
def two_workers():
    with make(2) as vec_env:
        yield vec_env


@pytest.fixture
def vec_env(two_workers):
    two_workers.reset(SEED)
    return two_workers


@pytest.fixture
def doomed():
    with make(1, num_envs=2) as vec_env:
        vec_env.reset(SEED)
        yield vec_env


def chunks(count: int) -> list[torch.Tensor]:
    """Random chunks in which a fifth of the actions succeed and no simulator comes to harm."""
    generator = torch.Generator().manual_seed(0)
    actions = torch.rand(count, N, H, 4, generator=generator) - 0.5
    actions[..., SUCCEED] += 0.6 * (torch.rand(count, N, H, generator=generator) < 0.4)
    return list(actions)


def step(vec_env: WorkerVecEnv, actions: torch.Tensor) -> ChunkResult:
    vec_env.step_async(actions, range(N))
    return vec_env.step_wait(range(N))


def step_in_groups(vec_env: WorkerVecEnv, actions: torch.Tensor, groups: list[range]) -> list[ChunkResult]:
    """Start the groups in order and wait for them in reverse."""
    for group in groups:
        vec_env.step_async(actions[list(group)], group)
    return [vec_env.step_wait(group) for group in reversed(groups)][::-1]


def tensors(result: ChunkResult) -> dict[str, torch.Tensor]:
    values = {entry.name: getattr(result, entry.name) for entry in fields(result)}
    return values | {"obs": result.obs["state"], "final_obs": result.final_obs["state"]}


def assert_equal(result: ChunkResult, reference: ChunkResult, rows: range = range(N)) -> None:
    for name, value in tensors(result).items():
        assert torch.equal(value, tensors(reference)[name][list(rows)]), name


def command(kind: int, env: int) -> torch.Tensor:
    actions = torch.zeros(2, H, 4)
    actions[env, 1, kind] = 1.0
    return actions


def test_groups_in_any_wait_order_equal_the_whole_batch_bit_for_bit(vec_env):
    whole = [step(vec_env, actions) for actions in chunks(8)]
    assert sum(int(result.terminated.sum()) for result in whole) > 5
    vec_env.reset(SEED)
    groups = [range(0, N, 3), range(1, N, 3), range(2, N, 3)]
    for actions, reference in zip(chunks(8), whole, strict=True):
        for group, result in zip(groups, step_in_groups(vec_env, actions, groups), strict=True):
            assert_equal(result, reference, group)


def test_the_number_of_workers_changes_nothing(vec_env):
    with make(1) as other:
        assert torch.equal(other.reset(SEED)["state"], vec_env.reset(SEED)["state"])
        for actions in chunks(8):
            assert_equal(step(other, actions), step(vec_env, actions))


def test_one_environment_that_ends_does_not_cut_the_chunk_of_another(vec_env):
    actions = torch.zeros(N, H, 4)
    actions[1, 0, SUCCEED] = 1.0
    assert step(vec_env, actions).executed.tolist() == [4, 1, 4, 4, 4]


def test_results_are_owned_by_the_caller(vec_env):
    first = step(vec_env, chunks(2)[0])
    copies = {name: value.clone() for name, value in tensors(first).items()}
    step(vec_env, chunks(2)[1])
    assert all(torch.equal(value, copies[name]) for name, value in tensors(first).items())


def test_an_environment_with_a_chunk_under_way_takes_no_second_one(vec_env):
    vec_env.step_async(torch.zeros(N, H, 4), range(N))
    with pytest.raises(EnvError, match=r"environments \[2\]"):
        vec_env.step_async(torch.zeros(1, H, 4), range(2, 3))
    with pytest.raises(EnvError, match="under way"):
        vec_env.reset(SEED)
    vec_env.step_wait(range(N))


def test_threads_of_the_parent_are_left_as_they_were(vec_env):
    assert "NUMBA_NUM_THREADS" not in os.environ


def test_a_raising_simulator_shows_its_traceback_and_ends_the_use(doomed):
    doomed.step_async(command(RAISE, env=1), range(2))
    with pytest.raises(EnvError, match=r"(?s)environments 0 to 1.*Traceback.*the fake was told to raise"):
        doomed.step_wait(range(2))
    with pytest.raises(EnvError, match="the fake was told to raise"):
        doomed.reset(SEED)


def test_a_worker_that_dies_in_a_chunk_is_named_with_its_exit_code(doomed):
    doomed.step_async(command(DIE, env=0), range(2))
    with pytest.raises(EnvError, match=r"worker 0 \(environments 0 to 1\) died with exit code 3"):
        doomed.step_wait(range(2))


def test_a_worker_killed_between_chunks_is_an_error_at_the_next_wait(doomed):
    process = max(multiprocessing.active_children(), key=lambda child: child.pid)  # the newest
    process.kill()
    process.join()
    doomed.step_async(torch.zeros(2, H, 4), range(2))
    with pytest.raises(EnvError, match="exit code -9"):
        doomed.step_wait(range(2))


def test_a_hung_worker_is_an_error_after_the_timeout_and_does_not_stop_close(doomed):
    doomed.step_async(command(HANG, env=1), range(2))
    start = time.monotonic()
    with pytest.raises(EnvError, match=r"worker 0 .* silent for 1 s \(env.step_timeout_s\)"):
        doomed.step_wait(range(2))
    doomed.close()
    assert time.monotonic() - start < 10.0


def make_nothing(seed: int):
    raise ValueError(f"no simulator from {seed}")


def test_a_simulator_that_cannot_be_constructed_is_an_error_and_leaves_no_process():
    before = set(multiprocessing.active_children())
    with pytest.raises(EnvError, match="ValueError: no simulator from"):
        make(1, make_simulator=make_nothing)
    assert set(multiprocessing.active_children()) <= before


def test_close_in_the_middle_of_a_chunk_leaves_neither_process_nor_shared_memory_nor_descriptor():
    before = set(multiprocessing.active_children()), _shared_memory(), len(os.listdir("/proc/self/fd"))
    vec_env = make(2)
    vec_env.reset(SEED)
    vec_env.step_async(torch.zeros(N, H, 4), range(N))
    vec_env.close()
    vec_env.close()
    after = set(multiprocessing.active_children()), _shared_memory(), len(os.listdir("/proc/self/fd"))
    assert after == before
    with pytest.raises(EnvError, match="closed"):
        vec_env.reset(SEED)


def _shared_memory() -> set[Path]:
    return set(Path("/dev/shm").glob("torch_*"))


@pytest.mark.parametrize("group", [range(6), range(1, 11, 3), range(4, 5), range(9, 11)])
@pytest.mark.parametrize("block", [range(3), range(3, 8), range(8, 11)])
def test_the_part_of_a_group_in_a_block_is_its_intersection(group, block):
    assert list(_intersect(group, block)) == sorted(set(group) & set(block))
