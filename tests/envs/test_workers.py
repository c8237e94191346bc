"""Simulators in processes: same transitions for every layout, faults survived, nothing left behind."""

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_simulator import ACTION_DIM, DIE, HANG, NAN_OBS, NAN_REWARD, RAISE, SUCCEED, FakeSimulator

from asyncflow.config import EnvConfig
from asyncflow.envs import worker
from asyncflow.envs.base import ChunkResult, EnvInterrupted
from asyncflow.envs.workers import WorkerVecEnv
from asyncflow.errors import EnvError
from asyncflow.seeding import derive_seed

N, H, SEED = 5, 4, 3


def make(num_workers: int, num_envs: int = N, make_simulator=FakeSimulator, **keys) -> WorkerVecEnv:
    config = EnvConfig(**{"num_workers": num_workers, "step_timeout_s": 2.0, "max_restarts": 0} | keys)
    return WorkerVecEnv(make_simulator, config, num_envs, H, SEED)


@pytest.fixture(scope="module")
def two_workers():
    with make(2) as vec_env:
        yield vec_env


@pytest.fixture
def vec_env(two_workers):
    two_workers.reset(SEED)
    return two_workers


@pytest.fixture(scope="module")
def one_worker():
    # Replacing a worker takes longer than the window, so one after another is allowed and two at once are not.
    with make(1, num_envs=2, max_restarts=1, restart_window_s=0.5) as vec_env:
        yield vec_env


@pytest.fixture
def survivor(one_worker):
    one_worker.reset(SEED)
    return one_worker


@pytest.fixture
def doomed():
    with make(1, num_envs=2, max_restarts=0) as vec_env:
        vec_env.reset(SEED)
        yield vec_env


def chunks(count: int) -> list[torch.Tensor]:
    """Random chunks in which a fifth of the actions succeed and no simulator comes to harm."""
    generator = torch.Generator().manual_seed(0)
    actions = torch.rand(count, N, H, ACTION_DIM, generator=generator) - 0.5
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
    values = {
        entry.name: getattr(result, entry.name) for entry in fields(result) if entry.name not in ("faults", "spans")
    }
    return values | {"obs": result.obs["state"], "final_obs": result.final_obs["state"]}


def assert_equal(result: ChunkResult, reference: ChunkResult, rows: range = range(N)) -> None:
    for name, value in tensors(result).items():
        assert torch.equal(value, tensors(reference)[name][list(rows)]), name


IDLE = torch.zeros(2, H, ACTION_DIM)


def command(kind: int, env: int) -> torch.Tensor:
    actions = IDLE.clone()
    actions[env, 1, kind] = 1.0
    return actions


def process_of(vec_env: WorkerVecEnv) -> multiprocessing.Process:
    return vec_env._workers[0]._process


def first_draw(env: int, episode: int) -> float:
    return float(np.float32(np.random.default_rng(derive_seed(SEED, "episode", env, episode)).uniform()))


def kill(vec_env: WorkerVecEnv) -> None:
    process_of(vec_env).kill()
    process_of(vec_env).join()


def stop(vec_env: WorkerVecEnv) -> None:
    os.kill(process_of(vec_env).pid, signal.SIGSTOP)


def assert_broken(result: ChunkResult, first_draws: list[float]) -> None:
    """Check that a result counts for nothing and shows the first observations of episodes."""
    assert result.broken.all()
    for name in ("rewards", "executed", "terminated", "truncated", "episode_return", "episode_length"):
        assert not getattr(result, name).any(), name
    assert result.obs["state"][:, [0, 2]].tolist() == [[draw, 0.0] for draw in first_draws]
    assert torch.equal(result.obs["state"], result.final_obs["state"])


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
    actions = torch.zeros(N, H, ACTION_DIM)
    actions[1, 0, SUCCEED] = 1.0
    assert step(vec_env, actions).executed.tolist() == [4, 1, 4, 4, 4]


def test_results_are_owned_by_the_caller(vec_env):
    first = step(vec_env, chunks(2)[0])
    copies = {name: value.clone() for name, value in tensors(first).items()}
    step(vec_env, chunks(2)[1])
    assert all(torch.equal(value, copies[name]) for name, value in tensors(first).items())


def test_an_environment_with_a_chunk_under_way_takes_no_second_one(vec_env):
    vec_env.step_async(torch.zeros(N, H, ACTION_DIM), range(N))
    with pytest.raises(EnvError, match=r"environments \[2\]"):
        vec_env.step_async(torch.zeros(1, H, ACTION_DIM), range(2, 3))
    with pytest.raises(EnvError, match="under way"):
        vec_env.reset(SEED)
    vec_env.step_wait(range(N))


def test_threads_of_the_parent_are_left_as_they_were(vec_env):
    assert "NUMBA_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(
    ("kind", "actions", "harm", "cause"),
    [
        ("died", command(HANG, env=1), kill, "died with exit code -9"),
        ("died", command(DIE, env=0), None, "died with exit code 3"),
        ("raised", command(RAISE, env=1), None, "raised ArithmeticError: the fake was told to raise"),
        ("timeout", command(HANG, env=0), stop, "was silent for 2 s (env.step_timeout_s)"),
    ],
)
def test_a_worker_that_fails_in_a_chunk_is_replaced_and_its_environments_go_on(survivor, kind, actions, harm, cause):
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
    assert old not in multiprocessing.active_children()
    assert not run(survivor, IDLE).broken.any()


def run(vec_env: WorkerVecEnv, actions: torch.Tensor, env_ids: range = range(2)) -> ChunkResult:
    vec_env.step_async(actions, env_ids)
    return vec_env.step_wait(env_ids)


def test_a_lost_episode_counts_and_the_next_ones_follow_their_own_seeds(survivor):
    run(survivor, command(SUCCEED, env=1))
    assert_broken(run(survivor, command(DIE, env=0)), [first_draw(0, 1), first_draw(1, 2)])
    assert survivor.journal().episodes == [1, 2]
    result = run(survivor, command(SUCCEED, env=0))
    assert result.obs["state"][0, 0] == first_draw(0, 2)
    assert result.episode_length.tolist() == [2, 0]
    assert [len(chunks) for chunks in survivor.journal().chunks] == [0, 1]


def test_a_group_whose_chunk_was_lost_with_anothers_learns_it_at_its_own_wait(survivor):
    groups = [range(1), range(1, 2)]
    survivor.step_async(IDLE[:1], groups[0])
    survivor.step_async(command(DIE, env=1)[1:], groups[1])
    first = survivor.step_wait(groups[1])
    assert [fault.kind for fault in first.faults] == ["died"]
    second = survivor.step_wait(groups[0])  # nobody would answer a wait for the old worker's message
    assert second.faults == ()
    assert_broken(second, [first_draw(0, 1)])
    assert not run(survivor, IDLE).broken.any()


def test_a_group_without_a_chunk_under_way_starts_none_in_an_episode_it_has_not_seen(survivor):
    run(survivor, IDLE)
    run(survivor, command(DIE, env=1)[1:], range(1, 2))
    assert_broken(run(survivor, command(SUCCEED, env=0)[:1], range(1)), [first_draw(0, 1)])
    assert run(survivor, IDLE).obs["state"][:, 2].tolist() == [H, H]


def test_a_worker_that_dies_between_chunks_is_replaced_at_the_next_wait(survivor):
    kill(survivor)
    assert_broken(run(survivor, IDLE), [first_draw(0, 1), first_draw(1, 1)])


def test_a_worker_that_is_dead_at_a_reset_is_replaced_and_reported_later(survivor):
    kill(survivor)
    assert survivor.reset(SEED)["state"][:, 0].tolist() == [first_draw(0, 1), first_draw(1, 1)]
    result = run(survivor, IDLE)
    assert not result.broken.any()
    assert [fault.kind for fault in result.faults] == ["died"]


def make_unreliable(log: Path, fails: Callable[[int], bool], seed: int) -> FakeSimulator:
    """Construct a simulator unless `fails` is true of how many were constructed before."""
    with log.open("a") as file:
        file.write(".")
    if fails(log.stat().st_size - 1):
        raise OSError("no memory")
    return FakeSimulator(seed)


def is_second(count: int) -> bool:
    return count == 1


def test_a_replacement_that_fails_is_another_restart(tmp_path):
    make_simulator = partial(make_unreliable, tmp_path / "log", is_second)
    with make(1, num_envs=1, make_simulator=make_simulator, max_restarts=2) as vec_env:
        vec_env.reset(SEED)
        result = run(vec_env, command(DIE, env=0)[:1], range(1))
        assert [fault.kind for fault in result.faults] == ["died", "raised"]
        assert_broken(result, [first_draw(0, 2)])


def test_more_restarts_than_allowed_end_the_use_with_the_last_traceback(doomed):
    doomed.step_async(command(RAISE, env=1), range(2))
    keys = r"1 workers failed within env.restart_window_s = 600, more than env.max_restarts = 0"
    with pytest.raises(EnvError, match=rf"(?s){keys}.*environments 0 to 1.*Traceback.*the fake was told to raise"):
        doomed.step_wait(range(2))
    with pytest.raises(EnvError, match="the fake was told to raise"):
        doomed.reset(SEED)


def test_restarts_are_counted_up_to_the_limit(tmp_path):
    make_simulator = partial(make_unreliable, tmp_path / "log", bool)
    with make(1, num_envs=1, make_simulator=make_simulator, max_restarts=1) as vec_env:
        vec_env.reset(SEED)
        with pytest.raises(EnvError, match=r"(?s)2 workers failed .*OSError: no memory"):
            run(vec_env, command(DIE, env=0)[:1], range(1))


@pytest.mark.parametrize(
    ("kind", "value", "what"),
    [
        (NAN_REWARD, 1.0, "the reward of its env step 2 "),
        (NAN_OBS, 1.0, "the observation of its env step 4 "),
        (0, torch.nan, "the action of its env step 2 "),
    ],
)
def test_a_number_that_is_not_finite_breaks_its_episode_and_no_other(vec_env, kind, value, what):
    actions = chunks(1)[0]
    whole = step(vec_env, actions)
    vec_env.reset(SEED)
    harmed = actions.clone()
    harmed[2] = 0.0
    harmed[2, 1, kind] = value
    result = step(vec_env, harmed)
    assert result.broken.tolist() == [env == 2 for env in range(N)]
    assert [fault.kind for fault in result.faults] == ["nonfinite"]
    assert result.faults[0].message.startswith(f"environment 2 gave up episode 0: {what}")
    assert result.obs["state"][2, 0] == first_draw(2, 1)
    others = [0, 1, 3, 4]
    for name, tensor in tensors(result).items():
        assert torch.equal(tensor[others], tensors(whole)[name][others]), name
    assert step(vec_env, actions).faults == ()


def test_an_interrupt_wakes_a_waiting_thread_and_close_leaves_nothing(monkeypatch):
    before = left_behind()
    vec_env = make(1, num_envs=2, step_timeout_s=100.0)
    vec_env.reset(SEED)
    vec_env.step_async(command(HANG, env=0), range(2))
    waits, raised = threading.Event(), []

    def wait(*arguments):
        waits.set()
        return multiprocessing.connection.wait(*arguments)

    def wait_for_chunk():
        with pytest.raises(EnvInterrupted) as info:
            vec_env.step_wait(range(2))
        raised.append(info.type)

    monkeypatch.setattr(worker, "wait", wait)
    thread = threading.Thread(target=wait_for_chunk)
    thread.start()
    waits.wait()
    vec_env.interrupt()
    thread.join()
    assert raised == [EnvInterrupted]
    with pytest.raises(EnvInterrupted):
        vec_env.reset(SEED)
    vec_env.close()
    vec_env.interrupt()
    assert left_behind() == before


def hang_later(log: Path, seed: int) -> FakeSimulator:
    """Construct a simulator the first time, and wait for ever from then on."""
    if log.exists():
        threading.Event().wait()
    log.touch()
    return FakeSimulator(seed)


def test_an_interrupt_from_a_signal_ends_the_wait_for_a_replacement(tmp_path, monkeypatch):
    vec_env = make(1, num_envs=1, make_simulator=partial(hang_later, tmp_path / "log"), max_restarts=1)
    old_handler = signal.signal(signal.SIGUSR1, lambda *_: vec_env.interrupt())
    try:
        vec_env.reset(SEED)
        vec_env.step_async(command(DIE, env=0)[:1], range(1))
        wait_ready = worker.Worker.wait_ready

        def wait_with_a_signal(self):
            signal.raise_signal(signal.SIGUSR1)
            return wait_ready(self)

        monkeypatch.setattr(worker.Worker, "wait_ready", wait_with_a_signal)
        with pytest.raises(EnvInterrupted):
            vec_env.step_wait(range(1))
    finally:
        signal.signal(signal.SIGUSR1, old_handler)
        vec_env.close()


def make_nothing(seed: int):
    raise ValueError(f"no simulator from {seed}")


def test_a_simulator_that_cannot_be_constructed_is_an_error_and_leaves_no_process():
    before = set(multiprocessing.active_children())
    with pytest.raises(EnvError, match="ValueError: no simulator from"):
        make(1, make_simulator=make_nothing)
    assert set(multiprocessing.active_children()) <= before


def left_behind() -> tuple[set, set[Path], int]:
    """Return the child processes, the shared memory and the number of descriptors that there are."""
    shared_memory = set(Path("/dev/shm").glob("torch_*"))
    return set(multiprocessing.active_children()), shared_memory, len(os.listdir("/proc/self/fd"))


def test_close_in_the_middle_of_a_chunk_leaves_neither_process_nor_shared_memory_nor_descriptor():
    before = left_behind()
    vec_env = make(2)
    vec_env.reset(SEED)
    vec_env.step_async(torch.zeros(N, H, ACTION_DIM), range(N))
    vec_env.close()
    vec_env.close()
    assert left_behind() == before
    with pytest.raises(EnvError, match="closed"):
        vec_env.reset(SEED)


def test_replaced_workers_leave_neither_process_nor_descriptor_nor_finalizer(survivor):
    finalizers = multiprocessing.util._finalizer_registry
    before = len(left_behind()[0]), *left_behind()[1:], len(finalizers)
    for harm in (RAISE, DIE):
        run(survivor, command(harm, env=0))
        assert (len(left_behind()[0]), *left_behind()[1:], len(finalizers)) == before


def test_close_ends_a_worker_that_is_stopped(doomed):
    process = process_of(doomed)
    stop(doomed)
    start = time.monotonic()
    doomed.close()
    assert time.monotonic() - start < 10.0
    assert process not in multiprocessing.active_children()


ORPHAN = """
import os, signal
from test_workers import make, process_of
vec_env = make(1, num_envs=1)
pid = process_of(vec_env).pid
os.kill(pid, signal.SIGSTOP)
os.waitpid(pid, os.WUNTRACED)
print(pid, flush=True)
signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills children with their parent")
def test_a_stopped_worker_dies_with_its_killed_parent():
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen([sys.executable, "-c", ORPHAN], env=environment, stdout=subprocess.PIPE) as parent:
        worker_end = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    try:
        assert select.select([worker_end], [], [], 30.0)[0]
    finally:
        os.close(worker_end)


def test_each_worker_tells_when_it_simulated_its_part(vec_env):
    before = time.perf_counter()
    spans = step(vec_env, torch.zeros(N, H, ACTION_DIM)).spans
    assert [span.worker for span in spans] == [0, 1]
    assert all(before < span.start_s < span.end_s < time.perf_counter() for span in spans)


def test_a_group_tells_of_its_own_chunk_only(vec_env):
    first, second = step_in_groups(vec_env, torch.zeros(N, H, ACTION_DIM), [range(0, 1), range(1, 5)])
    assert [span.worker for span in first.spans] == [0]
    assert [span.worker for span in second.spans] == [0, 1]
    assert first.spans[0].end_s <= second.spans[0].start_s  # one worker simulates one chunk after the other
