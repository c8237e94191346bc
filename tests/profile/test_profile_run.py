"""One leg on the toy task: it is traced, ends itself and leaves nothing behind."""

import signal
import tempfile
import threading
from pathlib import Path

import pytest
from fake_simulator import HarmlessSimulator
from inline_worker import simulators
from silent import TOY

from asyncflow.config.presets import load_config
from asyncflow.envs.server import running_workers
from asyncflow.profile.leg import leg_config, measure_span_cost, num_warmup, peak_memory, run_leg
from asyncflow.profile.read import Window
from asyncflow.run import parts

WINDOW = Window(num_warmup=2, num_updates=3)


def toy(**changes):
    return load_config("toy", TOY | changes)


@pytest.mark.parametrize("mode", ["standard", "vla"])
def test_a_leg_counts_its_windows_decisions_only(mode):
    leg = run_leg(toy(), mode, WINDOW)
    assert leg.counts == {"fresh": 3 * 32, "reused": 0, "dropped": 0}
    assert leg.lags == {(1 if mode == "vla" else 0): 3}
    assert len(leg.samples["period"]) == 3
    assert leg.seconds == pytest.approx(sum(leg.samples["period"]))


def test_a_leg_leaves_no_file_and_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_leg(toy(), "vla", WINDOW)
    assert list(tmp_path.iterdir()) == []
    assert running_workers() == []


def signal_from_another_thread(number):
    """Have a signal arrive at a thread that is not the main one, as the kernel may choose."""
    thread = threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), number))
    thread.start()
    thread.join()


def test_an_interrupt_while_a_legs_folder_is_made_leaves_none(tmp_path, monkeypatch):
    mkdtemp = tempfile.mkdtemp

    def interrupted(*arguments):
        folder = mkdtemp(*arguments)
        signal_from_another_thread(signal.SIGINT)
        return folder

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "mkdtemp", interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_leg(toy(), "vla", WINDOW)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert list(tmp_path.iterdir()) == []


def test_the_serial_leg_has_one_group_and_the_others_have_theirs():
    config = load_config("toy", TOY | {"collector.num_env_groups": 2})
    groups = {mode: leg_config(config, mode, WINDOW, Path("x")).collector.num_env_groups for mode in ("serial", "vla")}
    assert groups == {"serial": 1, "vla": 2}


def test_standard_legs_are_without_lag_as_users_have_them():
    config = load_config("toy", TOY | {"buffer.max_policy_lag": 3})
    assert leg_config(config, "standard", WINDOW, Path("x")).max_policy_lag == 0
    assert leg_config(config, "vla", WINDOW, Path("x")).max_policy_lag == 3


def test_legs_neither_evaluate_nor_save_within_their_window():
    config = leg_config(load_config("lift"), "vla", WINDOW, Path("x"))
    assert config.trainer.eval_interval == 0
    assert config.trainer.save_interval > WINDOW.last
    assert config.trainer.total_updates > WINDOW.last + 1


@pytest.mark.parametrize(("lag", "critic", "expected"), [(1, 0, 2), (4, 0, 5), (1, 3, 4)])
def test_warm_up_covers_the_ring_and_the_critics_updates(lag, critic, expected):
    changes = {"buffer.max_policy_lag": lag, "algorithm.critic_warmup_updates": critic}
    assert num_warmup(load_config("toy", TOY | changes)) == expected


def test_memory_is_that_of_this_process():
    memory = peak_memory()
    assert memory.process_bytes > 50e6
    assert memory.workers_bytes == 0


def test_a_span_costs_microseconds():
    assert measure_span_cost(1000) < 1e-4


def test_every_worker_has_a_lane_and_memory(monkeypatch):
    monkeypatch.setattr(parts, "make_vec_env", simulators(HarmlessSimulator))
    leg = run_leg(toy(**{"env.num_workers": 2}), "vla", WINDOW)
    assert {span.lane for span in leg.spans} == {"collector", "trainer", "worker 0", "worker 1"}
    assert leg.memory.workers_bytes > 20e6  # what two forked workers and their server do not share with others
    assert 0 < sum(leg.samples["env"]) <= sum(leg.samples["collect"])
