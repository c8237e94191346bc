"""The test that carries the project: both modes are the same function of configuration and seed, bit for bit."""

import itertools
import json
import threading

import pytest
import torch
from full_disk import fail_to_save
from silent import LIFT, LIFT_VLA, TOY, Silent, record, start

from asyncflow.config.presets import load_config
from asyncflow.envs.mapping import NameMapping
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.errors import AsyncflowError, CheckpointError, CollectorError, ConfigError, EnvError, TrainingError
from asyncflow.metrics.tracing import read_spans
from asyncflow.policies.policy_file import save_policy
from asyncflow.ppo.ppo import PPO
from asyncflow.run import recorded, trainer
from asyncflow.run.build import build_trainer
from asyncflow.run.checkpoint import list_checkpoints, load_checkpoint
from asyncflow.run.evaluate import EvalResult
from asyncflow.run.launch import train
from asyncflow.run.parts import build_policy
from asyncflow.run.recorded import RecordedRun
from asyncflow.simulators.spec import EnvSpec

FLOW = {
    "policy.kind": "flow",
    "policy.log_prob": "joint_mean",
    "policy.hidden_sizes": [32],
    "algorithm.clip_coef": 0.05,
}


def run(tmp_path, preset, changes):
    return record(tmp_path / f"run{len(list(tmp_path.iterdir()))}", preset, changes)


def assert_same(first, second):
    tensors, batches, rows = zip(first, second, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    assert len(batches[0]) == len(batches[1])
    for a, b in zip(*batches, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.flatten_keys().values(), b.flatten_keys().values(), strict=True))
    assert rows[0] == rows[1]


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("policy", [{}, FLOW], ids=["gaussian", "flow"])
def test_vla_equals_standard_on_the_toy(tmp_path, lag, policy):
    changes = TOY | policy | {"buffer.max_policy_lag": lag}
    vla = run(tmp_path, "toy", changes | {"trainer.buffer_type": "vla"})
    standard = run(tmp_path, "toy", changes | {"trainer.buffer_type": "standard"})
    assert_same(vla, standard)


@pytest.mark.parametrize("lag", [0, 2])
def test_vla_equals_standard_with_a_vla_that_sees_pictures(tmp_path, lag):
    changes = TOY | {"buffer.max_policy_lag": lag, "trainer.total_updates": 4}
    vla = run(tmp_path, "toy_vla_tiny", changes | {"trainer.buffer_type": "vla"})
    standard = run(tmp_path, "toy_vla_tiny", changes | {"trainer.buffer_type": "standard"})
    assert ("images", "top") in vla[1][0]["obs"].keys(True)
    assert_same(vla, standard)


@pytest.mark.sim
def test_vla_equals_standard_on_lift(tmp_path, lift_vla):
    """With another number of workers, too."""
    _, vla = lift_vla
    assert_same(vla, run(tmp_path, "lift", LIFT_VLA | {"trainer.buffer_type": "standard", "env.num_workers": 1}))


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 2])
def test_vla_equals_standard_on_lift_with_another_lag(tmp_path, lag):
    changes = LIFT | {"buffer.max_policy_lag": lag}
    vla = run(tmp_path, "lift", changes | {"trainer.buffer_type": "vla"})
    standard = run(tmp_path, "lift", changes | {"trainer.buffer_type": "standard"})
    assert_same(vla, standard)


def test_the_lag_changes_the_run(tmp_path):
    """Otherwise the equality above would prove nothing."""
    runs = [run(tmp_path, "toy", TOY | {"buffer.max_policy_lag": lag}) for lag in (0, 2)]
    assert not torch.equal(runs[0][0][0], runs[1][0][0])


@pytest.mark.parametrize("lag", [0, 1, 2, 4])
def test_fixed_lag_is_exact(tmp_path, lag):
    changes = TOY | {"buffer.max_policy_lag": lag, "trainer.buffer_type": "vla"}
    _, _, rows = run(tmp_path, "toy", changes)
    assert [row["staleness/policy_lag_max"] for row in rows] == [min(update, lag) for update in range(6)]


def test_bounded_lag_stays_within_its_bound(tmp_path):
    changes = TOY | {"buffer.max_policy_lag": 2, "buffer.lag_mode": "bounded", "trainer.total_updates": 15}
    _, _, rows = run(tmp_path, "toy", changes | {"trainer.buffer_type": "vla"})
    assert max(row["staleness/policy_lag_max"] for row in rows) <= 2


def test_overwriting_trains_only_whole_rollouts_and_the_books_balance(tmp_path):
    changes = TOY | {"buffer.lag_mode": "bounded", "buffer.on_full": "overwrite", "trainer.buffer_type": "vla"}
    _, batches, rows = run(tmp_path, "toy", changes | {"algorithm.update_epochs": 30})
    assert rows[-1]["buffer/trained"] == rows[-1]["decisions"] == 6 * 32
    assert all(batch["valid"].all() for batch in batches)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_give_the_same_transitions(tmp_path, groups):
    """To float tolerance: a matrix product of another height may round differently."""
    reference = run(tmp_path, "toy", TOY | FLOW | {"trainer.total_updates": 1})
    changes = TOY | FLOW | {"trainer.total_updates": 1, "collector.num_env_groups": groups}
    other = run(tmp_path, "toy", changes)
    torch.testing.assert_close(other[1][0]["chains"], reference[1][0]["chains"], atol=1e-4, rtol=1e-4)
    assert torch.equal(other[1][0]["executed"], reference[1][0]["executed"])


def test_steps_are_counted_fresh(tmp_path):
    """A predecessor trained the same full buffer again and again and reported 14 times its speed."""
    _, batches, rows = run(tmp_path, "toy", TOY | {"trainer.buffer_type": "vla"})
    assert [row["decisions"] for row in rows] == [32 * n for n in range(1, 7)]
    assert rows[-1]["env_steps"] == sum(int(batch["executed"].sum()) for batch in batches)
    distinct = {batch["obs", "state"].sum().item() for batch in batches}
    assert len(distinct) == len(batches)


def test_evaluation_does_not_disturb_training(tmp_path):
    """Evaluation has simulators of its own, so a run with it equals one without."""
    plain = run(tmp_path, "toy", TOY)
    evaluated = run(tmp_path, "toy", TOY | {"trainer.eval_interval": 2, "trainer.eval_episodes": 5})
    assert all(torch.equal(a, b) for a, b in zip(plain[0], evaluated[0], strict=True))


def test_a_stop_ends_an_evaluation_between_two_decisions(tmp_path, monkeypatch):
    changes = TOY | {"trainer.eval_interval": 1, "trainer.eval_episodes": 100_000, "logging.out": str(tmp_path / "run")}
    reporter, calls = Silent(), []
    step_wait = ToyVecEnv.step_wait

    def count(env, env_ids):
        calls.append(env_ids)
        if len(calls) == 20:
            trainers[0].request_stop()
        return step_wait(env, env_ids)

    trainers = []
    monkeypatch.setattr(ToyVecEnv, "step_wait", count)
    train(load_config("toy", changes), reporter, trainers.append)
    assert len(calls) == 20
    assert reporter.ended


def test_a_failed_collector_ends_an_evaluation(tmp_path, monkeypatch):
    step_wait, trainers, decisions = ToyVecEnv.step_wait, [], []

    def fail_in_second_rollout(env, env_ids):
        if env is trainers[0].trainer.env and trainers[0].progress.updates == 1:
            raise EnvError("workers were replaced too often")
        return step_wait(env, env_ids)

    def decide_twice(policy, env, num_episodes, seed, on_decision):
        if trainers[0].progress.updates == 1:
            trainers[0].trainer.collector._thread.join()
        for _ in range(2):
            on_decision(0)
            decisions.append(trainers[0].progress.updates)
        return EvalResult(1, 0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0)

    monkeypatch.setattr(ToyVecEnv, "step_wait", fail_in_second_rollout)
    monkeypatch.setattr(recorded, "evaluate", decide_twice)
    changes = TOY | {"trainer.buffer_type": "vla", "trainer.eval_interval": 1, "logging.out": str(tmp_path / "run")}
    with pytest.raises(CollectorError, match="too often"):
        train(load_config("toy", changes), Silent(), trainers.append)
    assert decisions == [0, 0]


def test_env_steps_end_a_run_too(tmp_path):
    changes = TOY | {"trainer.total_updates": None, "trainer.total_env_steps": 100}
    for buffer_type in ("vla", "standard"):
        _, _, rows = run(tmp_path, "toy", changes | {"trainer.buffer_type": buffer_type})
        assert rows[-2]["env_steps"] < 100 <= rows[-1]["env_steps"]


def test_collecting_goes_on_during_an_update(tmp_path, monkeypatch):
    """Update n waits at its first minibatch for rollout n + 1, which waits for it at its first decision."""
    meeting, met, decisions = threading.Barrier(2, timeout=60), [], itertools.count()
    step_async = ToyVecEnv.step_async

    def collect(env, actions, env_ids):
        rollout, decision = divmod(next(decisions), 8)
        if rollout > 0 and decision == 0:
            meeting.wait()
        step_async(env, actions, env_ids)

    def meet(built):
        check = built.trainer._check_update

        def check_and_meet():
            check()
            updates = built.progress.updates
            if updates not in met and updates < 3:  # of 4: no rollout follows the last one
                met.append(updates)
                meeting.wait()

        built.trainer._check_update = check_and_meet

    monkeypatch.setattr(ToyVecEnv, "step_async", collect)
    changes = TOY | {"trainer.buffer_type": "vla", "trainer.total_updates": 4, "logging.trace": True}
    train(load_config("toy", changes | {"logging.out": str(tmp_path / "run")}), Silent(), meet)
    spans = read_spans(tmp_path / "run" / "trace.json")
    updates, rollouts = ([span for span in spans if span.name == name] for name in ("update", "collect"))
    assert all(
        update.start_s < rollout.end_s and rollout.start_s < update.end_s
        for update, rollout in zip(updates[:3], rollouts[1:], strict=True)
    )
    assert met == [0, 1, 2]


def test_nothing_is_left_running(tmp_path):
    run(tmp_path, "toy", TOY | {"trainer.buffer_type": "vla"})
    assert [t.name for t in threading.enumerate() if "asyncflow" in t.name] == []


def test_a_stop_ends_with_a_checkpoint(tmp_path):
    config = load_config("toy", TOY | {"logging.out": str(tmp_path / "run"), "trainer.total_updates": 10_000})
    reporter = Silent()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    built = RecordedRun(build_trainer(config), None, config, tmp_path / "run", reporter=reporter)
    reporter.update = lambda row: built.request_stop() if row["updates"] == 3 else None
    try:
        built.run()
    finally:
        built.close()
    state = json.loads((tmp_path / "run" / "checkpoints" / "last" / "state.json").read_text())
    assert state["updates"] == 3
    assert reporter.ended


@pytest.mark.parametrize("key", ["policy.checkpoint", "trainer.device", "policy.log_prob"])
def test_a_mistake_is_found_before_simulators_are_built(tmp_path, monkeypatch, key):
    wrong = {"policy.checkpoint": "nowhere", "trainer.device": "cuda:77", "policy.log_prob": "per_step"}
    changes = TOY | {"logging.out": str(tmp_path / "run"), key: wrong[key]}
    monkeypatch.setattr("asyncflow.run.parts.make_vec_env", lambda *_: pytest.fail("simulators were built"))
    with pytest.raises(ConfigError):
        train(load_config("toy", changes), Silent())
    assert not (tmp_path / "run").exists()


def test_a_trainer_that_cannot_be_built_leaves_no_environment_open(tmp_path, monkeypatch):
    closed = []
    close = ToyVecEnv.close
    monkeypatch.setattr(ToyVecEnv, "close", lambda env: (closed.append(env), close(env)))
    monkeypatch.setattr("asyncflow.run.recorded.MetricLogger", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        train(load_config("toy", TOY | {"logging.out": str(tmp_path / "run")}), Silent())
    assert len(closed) == 1


def test_weights_for_other_observations_are_refused(tmp_path):
    changes = LIFT | {"logging.out": str(tmp_path / "run"), "env.task": "Lift", "policy.checkpoint": "lift_flow"}
    config = load_config("lift", changes)
    spec = EnvSpec(
        {"state": (19,)}, 7, 120, obs_keys=("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
    )
    with pytest.raises(CheckpointError, match=r"policy.checkpoint = lift_flow: made for env.obs_keys"):
        build_policy(config, NameMapping(config.policy.mapping, spec), torch.device("cpu"))


def test_a_full_disk_at_a_checkpoint_is_reported_and_the_run_goes_on(tmp_path, monkeypatch):
    """The save at update 2 fails; that at update 4 and the end succeed."""
    fail_to_save(monkeypatch, updates=2)
    reporter = Silent()
    train(load_config("toy", TOY | {"logging.out": str(tmp_path / "run"), "trainer.save_interval": 2}), reporter)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["update_000004", "update_000006"]
    assert reporter.notices == [
        "the checkpoint of update 2 could not be written: No space left on device; newest: none; "
        "trying again at the next save"
    ]


def test_an_end_that_cannot_be_saved_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "save_checkpoint", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(AsyncflowError, match="the run's end could not be saved; newest checkpoint: none"):
        train(load_config("toy", TOY | {"logging.out": str(tmp_path / "run")}), Silent())


@pytest.mark.parametrize("buffer_type", ["vla", "standard"])
def test_an_update_abandoned_after_a_stop_leaves_the_boundary_before_it(tmp_path, monkeypatch, buffer_type):
    monkeypatch.setattr(trainer, "STOP_GRACE_S", 0.0)
    changes = TOY | {"trainer.buffer_type": buffer_type, "logging.out": str(tmp_path / "run")}

    def stop_in_third_update(built):
        check, calls = built.trainer._check_update, []

        def count():
            calls.append(1)
            if built.progress.updates == 2 and len(calls) % 3 == 0:  # not at its first minibatch
                built.request_stop()
            check()

        built.trainer._check_update = count

    uncut = str(tmp_path / "uncut")
    train(load_config("toy", changes | {"trainer.total_updates": 2, "logging.out": uncut}), Silent())
    train(load_config("toy", changes), Silent(), stop_in_third_update)
    saved, expected = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("run", "uncut"))
    assert saved.state.updates == 2
    assert all(torch.equal(saved.policy[name], expected.policy[name]) for name in expected.policy)
    optimizers = saved.groups["optimizer"], expected.groups["optimizer"]
    assert all(torch.equal(optimizers[0][name], optimizers[1][name]) for name in optimizers[1])


def test_a_failed_collector_leaves_what_was_trained_saved(tmp_path, monkeypatch):
    step_wait, calls = ToyVecEnv.step_wait, []

    def fail(env, env_ids):
        calls.append(env_ids)
        if len(calls) == 30:
            raise EnvError("workers were replaced too often")
        return step_wait(env, env_ids)

    monkeypatch.setattr(ToyVecEnv, "step_wait", fail)
    with pytest.raises(CollectorError, match="too often"):
        train(load_config("toy", TOY | {"logging.out": str(tmp_path / "run")}), Silent())
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert load_checkpoint(list_checkpoints(tmp_path / "run")[-1]).state.updates == len(rows) > 0


def test_training_that_diverges_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    update, calls = PPO.update, []

    def diverge(self, *arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise TrainingError("training diverged")
        return update(self, *arguments)

    monkeypatch.setattr(PPO, "update", diverge)
    changes = TOY | {"logging.out": str(tmp_path / "run"), "trainer.save_interval": 2}
    with pytest.raises(TrainingError, match=r"training diverged; last good checkpoint: .*update_000002"):
        train(load_config("toy", changes), Silent())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("buffer_type", ["vla", "standard"])
def test_the_toy_trains_on_a_gpu(tmp_path, buffer_type):
    changes = TOY | FLOW | {"trainer.device": "cuda", "algorithm.critic_warmup_updates": 1}
    _, _, rows = run(tmp_path, "toy", changes | {"trainer.buffer_type": buffer_type})
    assert len(rows) == 6


@pytest.mark.parametrize(("half_range", "num_told"), [(0.05, 1), (1.0, 0)])
def test_a_policy_that_no_longer_sees_what_it_observes_is_told_once(tmp_path, half_range, num_told):
    config = load_config("toy", TOY)
    policy = build_policy(config, NameMapping(config.policy.mapping, ToyVecEnv(1, 2).spec), torch.device("cpu"))
    policy.obs_normalizer.set_range(torch.full((4,), -half_range), torch.full((4,), half_range))
    save_policy(tmp_path / "start.safetensors", policy, config.policy, ToyVecEnv(1, 2).spec)
    reporter = start(tmp_path / "run", "toy", TOY | {"policy.checkpoint": str(tmp_path / "start.safetensors")})
    told = [notice for notice in reporter.notices if "are cut there, most often state[" in notice]
    assert len(told) == num_told
