"""A policy file is evaluated in the environment that it carries; the configuration gives the rest."""

import json

import pytest
import torch
from silent import TOY, start

from asyncflow.config.presets import load_config
from asyncflow.config.sections import PolicyConfig
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.errors import ConfigError, EnvError
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import load_policy_file, save_policy
from asyncflow.run import evaluate_file as module
from asyncflow.run.evaluate_file import evaluate_checkpoint
from asyncflow.seeding import derive_seed
from asyncflow.simulators.spec import EnvSpec

POLICY = PolicyConfig(hidden_sizes=[8], critic_hidden_sizes=[8], horizon=4, n_action_steps=3)
TOY_SPEC = EnvSpec({"state": (4,)}, 2, horizon=7, task="Toy")
META = {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": ["Panda"]}}
LIFT_SPEC = EnvSpec({"state": (4,)}, 2, horizon=33, env_meta=META, obs_keys=("object",))


def config(**changes):
    return load_config("toy", TOY | changes)


@pytest.fixture
def policy_file(tmp_path):
    """Return a function that writes a policy made for an environment."""

    def write(spec):
        path = tmp_path / "policy.safetensors"
        save_policy(path, make_policy(POLICY, spec, seed=3), POLICY, spec)
        return str(path)

    return write


@pytest.fixture
def built(monkeypatch):
    """Return what is asked of `make_vec_env`, which always builds a toy, and whether that was closed."""
    asked = {"num_closed": 0}

    class Toy(ToyVecEnv):
        def close(self):
            asked["num_closed"] += 1
            super().close()

    def make(env_config, chunk_length, num_envs, seed):
        asked.update(
            config=env_config, meta=env_config.env_meta, chunk_length=chunk_length, num_envs=num_envs, seed=seed
        )
        return Toy(num_envs, chunk_length, env_config.horizon)

    monkeypatch.setattr(module, "make_vec_env", make)
    return asked


EVALUATED = TOY | {"trainer.eval_interval": 6, "trainer.eval_episodes": 6}


def test_the_file_is_evaluated_as_its_run_evaluates(uncut, monkeypatch):
    """Were the purposes one, the numbers were the same: policy, environment and noise are."""
    run = uncut(EVALUATED)
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    monkeypatch.setattr(module, "derive_seed", lambda seed, what: seed if what == "report" else derive_seed(seed, what))
    found = evaluate_checkpoint(str(run), load_config("toy", EVALUATED), 6)
    assert found.as_metrics() == {name: row[name] for name in row if name.startswith("eval/")}


def test_no_episode_is_one_by_which_a_run_chooses_its_best_checkpoint(tmp_path, monkeypatch):
    reset, seeds = ToyVecEnv.reset, []
    monkeypatch.setattr(ToyVecEnv, "reset", lambda env, seed, *rest: (seeds.append(seed), reset(env, seed, *rest))[1])
    start(tmp_path / "run", "toy", EVALUATED)
    of_the_run = set(seeds)
    assert len(of_the_run) == 2  # training and evaluation
    evaluate_checkpoint(str(tmp_path / "run"), load_config("toy", EVALUATED), 6)
    assert seeds[-1] not in of_the_run


def test_the_policy_has_the_files_weights(policy_file, built, monkeypatch):
    path, acted = policy_file(TOY_SPEC), []
    monkeypatch.setattr(module, "evaluate", lambda policy, *_: acted.append(policy.state_dict()))
    evaluate_checkpoint(path, config(), 2)
    saved = load_policy_file(path).tensors
    assert acted[0].keys() == saved.keys()
    assert all(torch.equal(acted[0][name], tensor) for name, tensor in saved.items())


def test_the_environment_is_the_files_and_not_the_configurations(policy_file, built):
    evaluate_checkpoint(policy_file(LIFT_SPEC), config(**{"env.horizon": 5}), 4)
    assert built["meta"] == META
    assert (built["config"].horizon, built["config"].obs_keys) == (33, ["object"])
    assert built["chunk_length"] == POLICY.n_action_steps


def test_workers_are_the_configurations(policy_file, built):
    evaluate_checkpoint(policy_file(LIFT_SPEC), config(**{"env.num_workers": 3}), 4)
    assert built["config"].num_workers == 3


def test_a_file_without_a_simulator_is_evaluated_on_the_toy_with_its_horizon(policy_file, built):
    result = evaluate_checkpoint(policy_file(TOY_SPEC), load_config("lift", {"trainer.device": "cpu"}), 4)
    assert (built["config"].task, built["meta"]) == ("Toy", None)
    assert 0 < result.episode_length <= 7


@pytest.mark.parametrize(("num_episodes", "num_envs"), [(2, 2), (9, 4)])
def test_no_more_environments_are_built_than_episodes_are_run(policy_file, built, num_episodes, num_envs):
    assert evaluate_checkpoint(policy_file(TOY_SPEC), config(), num_episodes).num_episodes == num_episodes
    assert built["num_envs"] == num_envs


def test_simulators_are_not_constructed_as_those_of_a_run(policy_file, built):
    """A cube's size is kept for good, by the seed."""
    evaluate_checkpoint(policy_file(TOY_SPEC), config(**{"trainer.seed": 5}), 2)
    assert built["seed"] not in (derive_seed(5, "evaluation"), derive_seed(5, "train"))


def test_environments_are_closed_at_the_end(policy_file, built):
    evaluate_checkpoint(policy_file(TOY_SPEC), config(), 2)
    assert built["num_closed"] == 1


def test_environments_are_closed_when_simulators_fail(policy_file, built, monkeypatch):
    monkeypatch.setattr(ToyVecEnv, "step_wait", lambda *_: (_ for _ in ()).throw(EnvError("workers died")))
    with pytest.raises(EnvError, match="workers died"):
        evaluate_checkpoint(policy_file(TOY_SPEC), config(), 2)
    assert built["num_closed"] == 1


def test_a_missing_file_is_refused_before_anything_is_built(built):
    with pytest.raises(ConfigError, match="nowhere"):
        evaluate_checkpoint("nowhere", config(), 2)
    assert built == {"num_closed": 0}


def test_a_missing_device_is_refused_before_anything_is_built(policy_file, built):
    with pytest.raises(ConfigError, match="cuda:77"):
        evaluate_checkpoint(policy_file(TOY_SPEC), config(**{"trainer.device": "cuda:77"}), 2)
    assert built == {"num_closed": 0}


def test_a_file_that_names_no_environment_is_refused_and_not_evaluated_on_the_toy(policy_file, built):
    with pytest.raises(ConfigError, match=r"policy.safetensors: names no environment to evaluate it in") as caught:
        evaluate_checkpoint(policy_file(EnvSpec({"state": (4,)}, 2, horizon=7)), config(), 2)
    assert "\n" not in str(caught.value)
    assert built == {"num_closed": 0}


def test_another_environment_under_the_same_name_is_refused(policy_file, built):
    other = EnvSpec({"state": (4,)}, 3, horizon=7, task="Mine")
    said = r"made for an environment of observations {'state': \[4\]} and actions of 3; what it names has .* of 2"
    with pytest.raises(ConfigError, match=said):
        evaluate_checkpoint(policy_file(other), config(), 2)
    assert built["num_closed"] == 1


def test_a_task_of_another_package_is_built_by_its_name_whatever_it_is_made_of(policy_file, built):
    spec = EnvSpec({"state": (4,)}, 2, horizon=7, task="Mine", env_meta=META, obs_keys=("own",))
    evaluate_checkpoint(policy_file(spec), config(), 2)
    assert (built["config"].task, built["config"].env_meta, built["config"].obs_keys) == ("Mine", None, ["own"])
