"""How the trainer gets its rollouts and how collecting fails and ends; on environments that the test scripts."""

import threading

import pytest
from counting_env import CountingEnv, build, finish_update
from waiting import PATIENCE_S

from asyncflow.envs.base import EnvInterrupted
from asyncflow.errors import CollectorError, ContractError, EnvError
from asyncflow.rollout.ring import BufferClosed


def test_an_inline_failure_is_a_collector_error_with_its_cause():
    _, _, collector = build(CountingEnv(fails_at=2))
    with pytest.raises(CollectorError, match="exit code -9") as info:
        collector.next_rollout()
    assert isinstance(info.value.__cause__, EnvError)


def test_a_failing_thread_wakes_the_trainer_with_its_traceback():
    """A predecessor's main thread waited forever for a collector that was dead."""
    _, channel, collector = build(CountingEnv(fails_at=5), num_slots=2, threaded=True)
    collector.start()
    finish_update(channel, collector.next_rollout())
    with pytest.raises(CollectorError, match="exit code -9") as info:
        collector.next_rollout()
    assert info.value.__cause__.__traceback__ is not None
    with pytest.raises(CollectorError):
        collector.check()
    collector.close()


@pytest.mark.parametrize("threaded", [False, True])
def test_an_environment_that_breaks_its_contract_is_told_as_such(threaded):
    """It is the user's to mend: one line, not a crash of the collector."""
    env = CountingEnv()
    env.step_wait = broken_step_wait
    _, _, collector = build(env, threaded=threaded)
    collector.start()
    with pytest.raises(ContractError, match="step_wait returned None"):
        collector.next_rollout()
    collector.close()


def broken_step_wait(env_ids):
    raise ContractError("mine.step_wait returned None; expected a ChunkResult")


def test_close_stops_a_thread_that_waits_for_a_slot():
    _, _, collector = build(CountingEnv(), num_slots=1, threaded=True)
    collector.start()
    collector.next_rollout()
    collector.close()
    collector.close()
    assert not collector._thread.is_alive()
    collector.check()  # a stop is not a failure
    with pytest.raises(BufferClosed):
        collector.next_rollout()


def test_only_one_thread_ever_steps_the_simulators():
    """A predecessor had two threads stepping one simulator after a restart."""
    env, threads = CountingEnv(), set()
    step_async = env.step_async
    env.step_async = lambda actions, env_ids: (threads.add(threading.get_ident()), step_async(actions, env_ids))
    _, channel, collector = build(env, num_slots=2, threaded=True)
    collector.start()
    for _ in range(3):
        finish_update(channel, collector.next_rollout())
    collector.close()
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_an_interrupted_wait_for_simulators_is_a_stop_and_not_a_failure():
    env = CountingEnv()
    entered = threading.Event()

    def step_wait(env_ids):
        entered.set()
        assert env.interrupted.wait(PATIENCE_S)
        raise EnvInterrupted("interrupted")

    env.step_wait = step_wait
    _, _, collector = build(env, num_slots=2, threaded=True)
    collector.start()
    assert entered.wait(PATIENCE_S)
    collector.close()
    collector.check()
    with pytest.raises(BufferClosed):
        collector.next_rollout()


def test_an_inline_wait_that_is_interrupted_is_a_stop():
    env = CountingEnv()
    env.step_wait = lambda env_ids: (_ for _ in ()).throw(EnvInterrupted("interrupted"))
    _, _, collector = build(env)
    with pytest.raises(BufferClosed):
        collector.next_rollout()


def test_an_exception_without_a_message_is_named():
    env = CountingEnv()
    env.step_wait = lambda env_ids: (_ for _ in ()).throw(EOFError)
    _, _, collector = build(env, num_slots=2, threaded=True)
    collector.start()
    with pytest.raises(CollectorError, match="the collector thread failed: EOFError"):
        collector.next_rollout()
    collector.close()
