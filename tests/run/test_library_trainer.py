"""A program's trainer: it trains on, is saved, resumed, interrupted and evaluated in between, bit for bit."""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from silent import TOY, outcome, start
from torch import Tensor, nn

import asyncflow as af
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.metrics.glossary import is_timing
from asyncflow.run.checkpoint import load_checkpoint

POLICY = {"hidden_sizes": [16], "critic_hidden_sizes": [16], "log_prob": "joint_sum"}
SETTINGS = {"update_epochs": 2, "learning_rate": 1e-3, "clip_coef": 0.2, "critic_warmup_updates": 0}


def make(buffer_type="vla", kind="gaussian", horizon=14, settings=None, **keys):
    """Return a trainer on the toy; its episodes are cut within a rollout."""
    env = af.make_env("Toy", num_envs=4, horizon=horizon)
    policy = af.make_policy(kind, env, **POLICY)
    return af.Trainer(
        policy, env, af.PPO(policy, **(settings or SETTINGS)), buffer_size=32, buffer_type=buffer_type, **keys
    )


def everything(trainer):
    """Return all that training goes on from, and the last row without timings."""
    tensors = {f"policy/{name}": x.clone() for name, x in trainer.policy.state_dict().items()}
    for group, named in trainer.groups().items():
        tensors |= {f"{group}/{name}": x.clone() for name, x in named.items()}
    row = {name: value for name, value in trainer.row.items() if not is_timing(name)}
    state = {name: x for name, x in vars(trainer.state()).items() if name not in ("row", "books")}
    return tensors, row, state


def assert_same(first, second):
    assert first[0].keys() == second[0].keys()
    assert [name for name in first[0] if not torch.equal(first[0][name], second[0][name])] == []
    assert first[1:] == second[1:]


@pytest.fixture
def uncut():
    with make() as trainer:
        trainer.train(total_updates=5)
        yield everything(trainer)


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_both_buffer_types_end_equal_with_the_same_lag(kind):
    ends = []
    for buffer_type in ("vla", "standard"):
        with make(buffer_type, kind, max_policy_lag=1) as trainer:
            trainer.train(total_updates=4)
            ends.append(everything(trainer))
    assert_same(*ends)


@pytest.mark.parametrize("buffer_type", ["vla", "standard"])
def test_a_programs_run_is_that_of_the_command_line(tmp_path, buffer_type):
    changes = {f"policy.{key}": value for key, value in POLICY.items()}
    changes |= {f"algorithm.{key}": value for key, value in SETTINGS.items()}
    changes |= {"trainer.buffer_type": buffer_type, "trainer.total_updates": 4, "env.horizon": 14}
    start(tmp_path / "run", "toy", TOY | changes)
    policy, groups, _, rows = outcome(tmp_path / "run")
    with make(buffer_type) as trainer:
        trainer.train(total_updates=4)
        tensors, row, _ = everything(trainer)
    assert {name: x for name, x in row.items() if name in rows[-1]} == rows[-1]
    stored = {f"policy/{name}": x for name, x in policy.items()}
    stored |= {f"{group}/{name}": x for group, named in groups.items() for name, x in named.items()}
    assert stored.keys() == tensors.keys()
    assert [name for name in stored if not torch.equal(stored[name], tensors[name])] == []


def test_a_second_call_trains_on_as_one_call_would(uncut):
    for first in (1, 4):
        with make() as trainer:
            trainer.train(total_updates=first)
            trainer.train(total_updates=5 - first)
            assert_same(everything(trainer), uncut)


def test_env_steps_of_a_call_are_counted_from_where_it_begins():
    with make() as trainer:
        for _ in range(2):
            before = trainer.progress.env_steps
            trainer.train(total_env_steps=100)
            assert 100 <= trainer.progress.env_steps - before < 100 + 64  # a rollout is 32 decisions of 2 steps


def test_what_was_collected_beyond_a_limit_of_env_steps_is_collected_again(uncut):
    with make() as trainer:
        trainer.train(total_env_steps=100)
        assert 1 < trainer.progress.updates < 5
        trainer.train(total_updates=5 - trainer.progress.updates)
        assert_same(everything(trainer), uncut)


@pytest.mark.parametrize("buffer_type", ["vla", "standard"])
def test_an_evaluation_in_the_trainers_environments_changes_nothing(uncut, buffer_type):
    def look(trainer, row):
        if row["updates"] == 2:
            af.evaluate(trainer.policy, trainer.env, 3)

    with make(buffer_type, max_policy_lag=1, callbacks=[look]) as trainer:
        trainer.train(total_updates=3)
        assert af.evaluate(trainer.policy, trainer.env, 6).num_episodes == 6
        trainer.train(total_updates=2)
        assert_same(everything(trainer), uncut)


@pytest.mark.parametrize("buffer_type", ["vla", "standard"])
def test_a_saved_trainer_goes_on_as_if_it_was_never_cut(tmp_path, uncut, buffer_type):
    with make(buffer_type, max_policy_lag=1) as trainer:
        trainer.train(total_updates=2)
        trainer.save(tmp_path / "saved")
    with af.Trainer.resume(tmp_path / "saved") as resumed:
        assert resumed.settings.buffer_type == buffer_type
        resumed.train(total_updates=3)
        assert_same(everything(resumed), uncut)


def test_a_trainer_is_saved_before_it_trains_and_again_in_its_place(tmp_path, uncut):
    with make() as trainer:
        trainer.save(tmp_path / "saved")
        with af.Trainer.resume(tmp_path / "saved") as resumed:
            resumed.train(total_updates=1)
            resumed.save(tmp_path / "saved")
    with af.Trainer.resume(tmp_path / "saved") as again:
        assert again.progress.updates == 1
        again.train(total_updates=4)
        assert_same(everything(again), uncut)


def test_a_run_of_the_command_line_is_gone_on_with(tmp_path):
    start(tmp_path / "run", "toy", TOY, stop_at=3)
    start(tmp_path / "uncut", "toy", TOY)
    with af.Trainer.resume(tmp_path / "run") as trainer:
        trainer.train(total_updates=3)
        tensors = everything(trainer)[0]
    policy, groups, _, _ = outcome(tmp_path / "uncut")
    assert all(torch.equal(tensors[f"policy/{name}"], x) for name, x in policy.items())
    assert all(torch.equal(tensors[f"optimizer/{name}"], x) for name, x in groups["optimizer"].items())


def test_a_saved_folder_is_a_checkpoint_for_everybody(tmp_path):
    with make() as trainer:
        trainer.train(total_updates=2)
        saved = trainer.save(tmp_path / "saved")
        loaded = af.load_policy(saved)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.policy.parameters(), strict=True))
    assert load_checkpoint(saved).state.updates == 2
    assert af.evaluate(loaded, "Toy", 4).num_episodes == 4


def test_saving_replaces_nothing_of_others(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with make() as trainer, pytest.raises(af.ConfigError, match="holds something else than a saved trainer"):
        trainer.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "kept"


class OwnPolicy(af.Policy):
    """A Gaussian of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.horizon = self.n_action_steps = self.action_dim = 2
        self.noise_size, self.log_prob_terms = 4, 1.0
        self.mean, self.critic = nn.Linear(4, 4), nn.Linear(4, 1)

    def sample_actions(self, obs, mode, noise):
        mean = self.mean(obs["state"])
        actions = (mean + 0.3 * noise if mode == "train" else mean).view(-1, 2, 2)
        out = af_tensors(len(mean), actions=actions)
        if mode == "train":
            out["log_probs"], out["values"] = self._log_probs(mean, actions), self.get_value(obs)
        return out

    def _log_probs(self, mean: Tensor, actions: Tensor) -> Tensor:
        return torch.distributions.Normal(mean, 0.3).log_prob(actions.flatten(1)).sum(1)

    def default_forward(self, batch):
        mean = self.mean(batch["obs"]["state"])
        entropy = torch.distributions.Normal(mean, 0.3).entropy().sum(1)
        log_probs = self._log_probs(mean, batch["actions"])
        return af_tensors(len(mean), log_probs=log_probs, values=self.get_value(batch["obs"]), entropy=entropy)

    def get_value(self, obs):
        return self.critic(obs["state"]).squeeze(-1)

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        return self.critic.parameters()


def af_tensors(size, **fields):
    from tensordict import TensorDict  # noqa: PLC0415

    return TensorDict(fields, batch_size=[size])


def own_trainer(env=None):
    torch.manual_seed(0)
    policy = OwnPolicy()
    return af.Trainer(policy, env or ToyVecEnv(4, 2, 14), af.PPO(policy, **SETTINGS), buffer_size=32)


def test_what_asyncflow_cannot_build_is_given_again(tmp_path):
    with own_trainer() as trainer:
        trainer.train(total_updates=4)
        uncut = everything(trainer)
    with own_trainer() as trainer:
        trainer.train(total_updates=2)
        trainer.save(tmp_path / "saved")
    with pytest.raises(af.ConfigError, match=r"give it again: policy=.*OwnPolicy\(...\), env=.*ToyVecEnv\(...\)"):
        af.Trainer.resume(tmp_path / "saved")
    with pytest.raises(af.CheckpointError, match="OwnPolicy, which asyncflow cannot build"):
        af.load_policy(tmp_path / "saved")
    with af.Trainer.resume(tmp_path / "saved", policy=OwnPolicy(), env=ToyVecEnv(4, 2, 14)) as resumed:
        resumed.train(total_updates=2)
        assert_same(everything(resumed), uncut)


def test_a_policy_that_breaks_its_contract_is_refused():
    class Broken(OwnPolicy):
        def get_value(self, obs):
            return self.critic(obs["state"])

    with pytest.raises(af.ConfigError, match=r"returned as values Tensor of shape \(2, 1\)"):
        af.Trainer(Broken(), ToyVecEnv(4, 2, 14), buffer_size=32)


def test_a_callback_sees_every_row_and_may_end_training(uncut):
    rows = []

    def stop_at_three(trainer, row):
        rows.append(row["updates"])
        if row["updates"] == 3:
            raise af.StopTraining

    with make(callbacks=[stop_at_three]) as trainer:
        assert trainer.train(total_updates=9)["updates"] == 3
        trainer.train(total_updates=2)
        assert rows == [1, 2, 3, 4, 5]
        assert_same(everything(trainer), uncut)


def test_a_callbacks_own_numbers_do_not_stop_saving(tmp_path):
    with make(callbacks=[lambda trainer, row: row.update({"mine/number": 1.0})]) as trainer:
        assert trainer.train(total_updates=1)["mine/number"] == 1.0
        trainer.save(tmp_path / "saved")
    with af.Trainer.resume(tmp_path / "saved") as resumed:
        assert "mine/number" not in resumed.row


def test_a_failing_callback_leaves_a_trainer_that_trains_on(uncut):
    def fail(trainer, row):
        if row["updates"] == 2:
            trainer.callbacks.clear()
            raise ArithmeticError("a bug")

    with make(callbacks=[fail]) as trainer:
        with pytest.raises(ArithmeticError, match="a bug"):
            trainer.train(total_updates=5)
        trainer.train(total_updates=3)
        assert_same(everything(trainer), uncut)


@pytest.mark.parametrize("buffer_type", ["vla", "standard"])
@pytest.mark.parametrize("where", ["in an update", "in a decision"])
def test_ctrl_c_leaves_a_trainer_that_trains_on(monkeypatch, uncut, buffer_type, where):
    step_async, calls = ToyVecEnv.step_async, []

    def press(env, actions, env_ids):
        step_async(env, actions, env_ids)
        calls.append(env_ids)
        if where == "in a decision" and len(calls) == 20:  # of the third rollout, in the middle
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # whose handler it is

    monkeypatch.setattr(ToyVecEnv, "step_async", press)
    monkeypatch.setattr("asyncflow.run.trainer.STOP_GRACE_S", 0.0)
    with make(buffer_type, max_policy_lag=1) as trainer:
        check, minibatches = trainer._check_update, []

        def check_and_press():
            minibatches.append(1)
            if where == "in an update" and len(minibatches) == 10:  # of 8 in an update
                signal.raise_signal(signal.SIGINT)
            check()

        trainer._check_update = check_and_press
        with pytest.raises(KeyboardInterrupt):
            trainer.train(total_updates=5)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert trainer.progress.updates < 5
        trainer.train(total_updates=5 - trainer.progress.updates)
        assert_same(everything(trainer), uncut)


def test_between_two_calls_nothing_runs():
    with make() as trainer:
        trainer.train(total_updates=2)
        assert not [thread for thread in threading.enumerate() if "asyncflow" in thread.name]


def test_a_forgotten_trainer_leaves_nothing_behind():
    trainer = make()
    trainer.train(total_updates=1)
    gone = [weakref.ref(trainer), weakref.ref(trainer.env), weakref.ref(trainer.channel.buffer)]
    del trainer
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


def test_a_new_trainer_takes_over_environments():
    with make() as first:
        first.train(total_env_steps=100)
        second = af.Trainer(first.policy, first.env, af.PPO(first.policy, **SETTINGS), buffer_size=32)
        second.train(total_updates=2)
        updates = first.progress.updates
        first.train(total_updates=1)
        assert (first.progress.updates, second.progress.updates) == (updates + 1, 2)


def test_a_closed_trainer_says_how_to_go_on():
    trainer = make()
    trainer.close()
    trainer.close()
    with pytest.raises(af.ConfigError, match=r"the trainer is closed; load what was saved: Trainer.resume"):
        trainer.train(total_updates=1)


def test_a_schedule_falls_over_the_updates_of_a_call():
    with make(settings=SETTINGS | {"lr_schedule": "linear"}) as trainer:
        assert trainer.train(total_updates=4)["train/learning_rate"] == pytest.approx(1e-3 / 4)
        assert trainer.train(total_updates=4)["train/learning_rate"] == pytest.approx(1e-3 / 8)
        with pytest.raises(af.ConfigError, match=r"lr_schedule = linear needs train\(total_updates"):
            trainer.train(total_env_steps=10)


def test_a_resumed_schedule_falls_over_the_updates_of_its_next_call(tmp_path):
    with make(settings=SETTINGS | {"lr_schedule": "linear"}) as trainer:
        trainer.train(total_updates=4)
        trainer.save(tmp_path / "saved")
        trainer.train(total_updates=4)
        on = everything(trainer)
    with af.Trainer.resume(tmp_path / "saved") as resumed:
        assert resumed.train(total_updates=4)["train/learning_rate"] == pytest.approx(1e-3 / 8)
        assert_same(everything(resumed), on)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"buffer_size": 30}, r"buffer.buffer_size = 30 must be a multiple of env.num_envs = 4"),
        ({"buffer_type": "sync"}, r"trainer.buffer_type = 'sync'"),
        ({"on_full": "overwrite"}, r"on_full = overwrite needs buffer.lag_mode = bounded"),
        ({"max_policy_lag": 9}, r"buffer.max_policy_lag = 9"),
    ],
)
def test_a_setting_that_cannot_be_is_named(change, said):
    env = ToyVecEnv(4, 2)
    policy = af.make_policy("gaussian", env, **POLICY)
    with pytest.raises(af.ConfigError, match=said):
        af.Trainer(policy, env, af.PPO(policy), **{"buffer_size": 32, **change})


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ({"callbacks": 3}, r"Trainer\(callbacks=3\): expected a list of functions"),
        ({"callbacks": print}, r"Trainer\(callbacks=<built-in function print>\): expected a list of functions"),
        ({"callbacks": [3]}, r"Trainer\(callbacks=\[3\]\): expected a list of functions"),
        ({"reporter": print}, r"Trainer\(reporter=<built-in function print>\): expected an object with update\(row\)"),
        ({"reporter": af.ConsoleReporter}, r"Trainer\(reporter=<class .*\): expected an object .* ConsoleReporter\(\)"),
        ({"env": 3}, r"Trainer\(env=3\): expected environments"),
        ({"ppo": 3}, r"Trainer\(ppo=3\): expected PPO\(policy, ...\)"),
    ],
)
def test_what_cannot_watch_or_update_is_named_with_its_argument(argument, said):
    env = ToyVecEnv(4, 2)
    policy = af.make_policy("gaussian", env, **POLICY)
    with pytest.raises(af.ConfigError, match=said):
        af.Trainer(**{"policy": policy, "env": env, "buffer_size": 32, **argument})


def test_parts_that_do_not_fit_together_are_refused():
    env = af.make_env("Toy", num_envs=4)
    policy = af.make_policy("gaussian", env.spec, **POLICY)  # four actions of a chunk, by default
    with pytest.raises(af.ConfigError, match=r"execute 2 actions of a chunk and the policy decides 4; they must agree"):
        af.Trainer(policy, env)
    with pytest.raises(af.ConfigError, match=r"they must agree"):
        af.evaluate(policy, env, 2)
    fitting = af.make_policy("gaussian", env, **POLICY)
    with pytest.raises(af.ConfigError, match="ppo updates another policy"):
        af.Trainer(fitting, env, af.PPO(policy))
    wide = af.make_policy("gaussian", af.EnvSpec({"state": (4,)}, 3, 9), n_action_steps=2, **POLICY)
    with pytest.raises(af.ConfigError, match="actions have 2 dimensions and the policy's 3"):
        af.Trainer(wide, env)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({}, "needs total_updates or"),
        ({"total_updates": 0}, r"train\(total_updates=0\): must be a whole number, at least 1"),
        ({"total_updates": 1.5}, r"train\(total_updates=1.5\): must be a whole number, at least 1"),
        ({"total_env_steps": "9"}, r"train\(total_env_steps='9'\): must be a whole number, at least 1"),
    ],
)
def test_a_call_needs_a_limit(limits, said):
    with make() as trainer, pytest.raises(af.ConfigError, match=said):
        trainer.train(**limits)
