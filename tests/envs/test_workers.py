"""Simulators in processes: same transitions for every layout, interrupts, nothing left behind."""

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_simulator import (
    ACTION_DIM,
    DIE,
    HANG,
    NAN_OBS,
    NAN_REWARD,
    SUCCEED,
    FakeSimulator,
    PipingSimulator,
    RudeSimulator,
    hang_later,
    make_nothing,
)
from inline_worker import work_inline
from worker_cases import (
    SEED,
    H,
    N,
    command,
    first_draw,
    is_running,
    left_behind,
    list_workers,
    make,
    process_of,
    stop,
    tensors,
)

from asyncflow.envs import worker, workers
from asyncflow.envs.base import ChunkResult, EnvInterrupted
from asyncflow.envs.chunks import ChunkBoard
from asyncflow.envs.server import Interpreter
from asyncflow.envs.worker import WorkerSetup, pack_factory
from asyncflow.envs.workers import WorkerVecEnv
from asyncflow.errors import ContractError, EnvError
from asyncflow.signals import ENDING_SIGNALS
from asyncflow.simulators import worker as simulating
from asyncflow.simulators.messages import Channel


@pytest.fixture(scope="module")
def two_workers():
    with make(2) as vec_env:
        yield vec_env


@pytest.fixture
def vec_env(two_workers):
    two_workers.reset(SEED)
    return two_workers


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


def assert_equal(result: ChunkResult, reference: ChunkResult, rows: range = range(N)) -> None:
    for name, value in tensors(result).items():
        assert torch.equal(value, tensors(reference)[name][list(rows)]), name


def test_groups_in_any_wait_order_equal_the_whole_batch_bit_for_bit(vec_env):
    whole = [step(vec_env, actions) for actions in chunks(8)]
    assert sum(int(result.terminated.sum()) for result in whole) > 5
    vec_env.reset(SEED)
    groups = [range(0, N, 3), range(1, N, 3), range(2, N, 3)]
    for actions, reference in zip(chunks(8), whole, strict=True):
        for group, result in zip(groups, step_in_groups(vec_env, actions, groups), strict=True):
            assert_equal(result, reference, group)


def test_neither_the_number_of_workers_nor_their_processes_change_anything(vec_env, monkeypatch):
    work_inline(monkeypatch)
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


@pytest.fixture
def short_farewell(monkeypatch):
    """Let `close` kill soon those that do not leave by themselves."""
    monkeypatch.setattr(workers, "_CLOSE_TIMEOUT_S", 0.1)


def test_an_interrupt_wakes_a_waiting_thread_and_close_leaves_nothing(monkeypatch, short_farewell):
    before = left_behind()
    vec_env = make(1, num_envs=2)
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


def test_an_interrupt_from_a_signal_ends_the_wait_for_a_replacement(tmp_path, monkeypatch, short_farewell):
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


def test_a_simulator_that_cannot_be_constructed_is_an_error_and_leaves_no_process():
    before = list_workers()
    with pytest.raises(EnvError, match="ValueError: no simulator from"):
        make(1, make_simulator=make_nothing)
    assert list_workers() <= before


def test_a_simulator_that_cannot_be_pickled_is_refused_in_one_line_and_leaves_no_process():
    before = list_workers()
    with pytest.raises(
        ContractError, match=r"^make_simulator = .*FakeSimulator.* cannot be pickled .*: .*lock.*; what it refers"
    ):
        make(1, make_simulator=partial(FakeSimulator, threading.Lock()))
    assert list_workers() <= before


class Script:
    """A worker's end of a channel, which brings these messages and then the parent's end."""

    def __init__(self, *messages):
        self.messages, self.sent = list(messages), []

    def receive(self):
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)

    def send(self, message):
        self.sent.append(message["kind"])


@pytest.fixture
def work(monkeypatch):
    """Return a function that lets a worker work in this process, until the parent's end."""

    def run(make_simulator, num_envs: int) -> list[str]:
        board = ChunkBoard.allocate(num_envs, H)
        setup = WorkerSetup([pack_factory(make_simulator, Interpreter())], board, 0, Interpreter())
        episodes = [[env, 0] for env in range(num_envs)]
        begin = {"number": 1, "command": "begin", "seed": SEED, "episodes": episodes}
        channel = Script(setup.message(range(num_envs)), begin)
        simulating.work(channel, board.memory.descriptor)
        return channel.sent

    monkeypatch.setattr(simulating, "_adopt", lambda setup: None)
    return run


def test_a_worker_is_heard_of_after_every_simulator_that_it_constructs_or_resets(work):
    """Some take seconds, a worker has many, and silence is what is timed."""
    assert work(FakeSimulator, 3) == ["alive"] * 3 + ["done"] + ["alive"] * 3 + ["done"]


def test_a_pipe_that_a_simulator_breaks_is_not_the_end_of_the_parent(work):
    """It was taken for it, and the worker left without a word."""
    with pytest.raises(BrokenPipeError):
        work(PipingSimulator, 1)


def run_idle(vec_env: WorkerVecEnv) -> ChunkResult:
    vec_env.step_async(torch.zeros(vec_env.num_envs, H, ACTION_DIM), range(vec_env.num_envs))
    return vec_env.step_wait(range(vec_env.num_envs))


def test_what_simulators_do_to_their_process_is_theirs(capfd):
    """They print, close what they were given, change the folder and the handlers of signals, and start threads."""
    folder = Path.cwd()
    with make(1, num_envs=1, make_simulator=RudeSimulator) as vec_env:
        vec_env.reset(SEED)
        assert not run_idle(vec_env).broken.any()
        process = process_of(vec_env)
        os.kill(process, signal.SIGINT)
        assert not run_idle(vec_env).broken.any()
    assert Path.cwd() == folder
    assert capfd.readouterr().out == ""
    assert not is_running(process)


@pytest.mark.parametrize("number", ENDING_SIGNALS)
def test_a_worker_ignores_what_the_parent_handles(vec_env, number):
    process = process_of(vec_env)
    os.kill(process, number)
    assert run_idle(vec_env).faults == ()
    assert process_of(vec_env) == process


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


def test_a_fork_that_closes_what_it_inherited_leaves_the_workers_to_the_parent():
    with make(1, num_envs=2) as vec_env:
        vec_env.reset(SEED)
        if (fork := os.fork()) == 0:
            vec_env.close()
            os._exit(0)
        os.waitpid(fork, 0)
        assert run_idle(vec_env).faults == ()


def test_what_was_half_written_when_a_worker_was_killed_is_its_death(monkeypatch):
    with make(1, num_envs=2, max_restarts=1) as vec_env:
        vec_env.reset(SEED)
        real, taken = Channel.take, []

        def take(self):
            message = real(self)
            taken.append(message)
            if len(taken) == 1:
                raise ValueError("not JSON")
            return message

        monkeypatch.setattr(Channel, "take", take)
        assert [fault.kind for fault in run_idle(vec_env).faults] == ["died"]


def test_close_ends_a_worker_that_is_stopped(short_farewell):
    """It sees nothing of its pipe's end, and would never leave by itself."""
    vec_env = make(1, num_envs=2)
    process = process_of(vec_env)
    stop(vec_env)
    vec_env.close()
    assert not is_running(process)


ORPHAN = """
import os, signal
from worker_cases import make, process_of
env = make(1)
process = process_of(env)
os.kill(process, signal.SIGSTOP)
print(process, flush=True)
signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills children with their parent")
def test_a_stopped_worker_dies_with_its_killed_parent():
    path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *filter(None, [os.environ.get("PYTHONPATH")])])
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
    assert [span.lane for span in spans] == ["worker 0", "worker 1"]
    assert all(before < span.start_s < span.end_s < time.perf_counter() for span in spans)


def test_a_group_tells_of_its_own_chunk_only(vec_env):
    first, second = step_in_groups(vec_env, torch.zeros(N, H, ACTION_DIM), [range(0, 1), range(1, 5)])
    assert [span.lane for span in first.spans] == ["worker 0"]
    assert [span.lane for span in second.spans] == ["worker 0", "worker 1"]
    assert first.spans[0].end_s <= second.spans[0].start_s  # one worker simulates one chunk after the other


class SlowSimulator(FakeSimulator):
    notices = ("it is slower than it was asked to be",)


@pytest.mark.parametrize("make_simulator", [FakeSimulator, SlowSimulator])
def test_what_a_simulator_has_to_tell_reaches_the_parent(make_simulator):
    with make(1, make_simulator=make_simulator) as env:
        assert env.notices == getattr(make_simulator, "notices", ())
