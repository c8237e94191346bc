"""Which environment a run simulates: that of its checkpoint, of `env.env_meta`, or of the policy it starts from."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
from silent import Silent

from asyncflow.config.presets import load_config
from asyncflow.config.sections import EnvConfig, PolicyConfig
from asyncflow.envs.source import adopt_environment, restore_environment, tell_change, tell_edit
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import save_policy
from asyncflow.run import parts
from asyncflow.run.build import build_trainer, check_start
from asyncflow.run.checkpoint import Checkpoint
from asyncflow.run.evaluate_file import evaluate_checkpoint
from asyncflow.run.launch import train
from asyncflow.run.start import name_task
from asyncflow.simulators.spec import EnvSpec

META = {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": ["Panda"], "control_freq": 20}}
KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
POLICY = PolicyConfig(hidden_sizes=[8], critic_hidden_sizes=[8])


def described(env_name="Lift", horizon=33, **kwargs):
    meta = deepcopy(META) | {"env_name": env_name}
    meta["env_kwargs"] |= kwargs
    return EnvSpec({"state": (19,)}, 7, horizon, env_meta=meta, obs_keys=KEYS, obs_widths=(3, 4, 2, 10))


TEN_HZ = described(control_freq=10)


@pytest.fixture
def policy_file(tmp_path):
    """Return a function that writes a policy made for an environment."""

    def write(spec, name="policy.safetensors"):
        save_policy(tmp_path / name, make_policy(POLICY, spec, 0), POLICY, spec)
        return str(tmp_path / name)

    return write


@pytest.fixture
def asked(monkeypatch):
    """Return what environments were asked for; none is built."""
    configs = []

    def make(env_config, *_):
        configs.append(env_config)
        raise InterruptedError

    monkeypatch.setattr(parts, "make_vec_env", make)
    return configs


def lift(checkpoint, **changes):
    small = {"policy.hidden_sizes": [8], "policy.critic_hidden_sizes": [8], "policy.checkpoint": checkpoint}
    return load_config("lift", small | changes)


def test_a_new_run_takes_the_environment_of_its_first_policy():
    adopted = adopt_environment(EnvConfig(), TEN_HZ)
    assert (adopted.env_meta, adopted.horizon, adopted.obs_keys) == (TEN_HZ.env_meta, 33, list(KEYS))


def test_what_the_configuration_says_stays():
    adopted = adopt_environment(EnvConfig(horizon=120, obs_keys=["object"]), TEN_HZ)
    assert (adopted.env_meta, adopted.horizon, adopted.obs_keys) == (TEN_HZ.env_meta, 120, ["object"])
    explicit = EnvConfig(env_meta="mine.json")
    assert adopt_environment(explicit, TEN_HZ) is explicit


@pytest.mark.parametrize("task", ["Square", "Toy"])
def test_a_policy_of_another_task_is_refused(task):
    with pytest.raises(CheckpointError, match=f"env.task = {task}: the policy to start from was made for PickPlaceCan"):
        adopt_environment(EnvConfig(task=task), described("PickPlaceCan"))


def test_an_environment_without_a_shorter_name_here_is_taken_by_its_own():
    adopted = adopt_environment(EnvConfig(task="Wipe"), described("Wipe"))
    assert adopted.env_meta["env_name"] == "Wipe"


def test_what_neither_policy_nor_task_knows_is_refused_by_name():
    with pytest.raises(ConfigError, match="Lift has no cube; it has"):
        adopt_environment(EnvConfig(obs_keys=["cube"]), TEN_HZ)
    with pytest.raises(ConfigError, match="there is no camera 'agentveiw'"):
        adopt_environment(EnvConfig(cameras=["agentveiw"]), TEN_HZ)


def test_simulators_are_built_as_the_policys_file_describes(policy_file, asked):
    config = lift(policy_file(TEN_HZ))
    check_start(config)
    with pytest.raises(InterruptedError):
        build_trainer(config)
    assert asked[0].env_meta["env_kwargs"]["control_freq"] == 10
    assert asked[0].horizon == load_config("lift").env.horizon


def test_a_policy_of_other_robots_is_no_mistake(policy_file):
    """Its sizes are not those of the task's own robot."""
    spec = EnvSpec({"state": (23,)}, 7, 33, env_meta=described(robots=["UR5e"]).env_meta, obs_keys=KEYS)
    check_start(lift(policy_file(spec)))


def test_a_resumed_run_builds_what_its_checkpoint_describes(tmp_path, policy_file, asked):
    policy_file(TEN_HZ)
    config = lift(None, **{"env.env_meta": str(tmp_path / "gone.json")})
    with pytest.raises(InterruptedError):
        build_trainer(config, resumed=Checkpoint(tmp_path, {}, {}, {}))
    assert asked[0].env_meta == TEN_HZ.env_meta


@pytest.mark.parametrize("meta", [{"env_name": "Lift"}, META | {"type": 2}])
def test_a_file_that_describes_no_environment_is_refused_in_a_line(policy_file, meta):
    checkpoint = policy_file(replace(described(), env_meta=meta))
    with pytest.raises(ConfigError, match="env_meta of the policy file: "):
        check_start(lift(checkpoint))
    name_task(None, {"policy.checkpoint": checkpoint})
    with pytest.raises(ConfigError, match="env_meta of the policy file: "):
        evaluate_checkpoint(checkpoint, load_config("lift"), 1)


def test_a_toy_has_no_description():
    toy = EnvSpec({"state": (4,)}, 2, 40, task="Toy")
    config = EnvConfig(task="Toy")
    assert adopt_environment(config, toy) is config
    assert restore_environment(config, toy) is config


def write_meta(path, spec):
    path.write_text(json.dumps(spec.env_meta))
    return EnvConfig(env_meta=str(path))


def test_another_environment_than_the_policys_is_told(tmp_path):
    config = write_meta(tmp_path / "meta.json", described())
    assert tell_change(config, described()) is None
    assert tell_change(config, TEN_HZ).endswith("made for: env_kwargs.control_freq 10 -> 20")


def test_a_file_that_was_edited_under_a_run_is_told(tmp_path):
    config = write_meta(tmp_path / "meta.json", described())
    assert "it goes on with what its checkpoint describes: env_kwargs.control_freq 10 -> 20" in tell_edit(
        config, TEN_HZ
    )
    (tmp_path / "meta.json").unlink()
    assert tell_edit(config, TEN_HZ) is None


def test_a_run_tells_that_it_does_not_take_the_policys_environment(tmp_path, policy_file, asked):
    (tmp_path / "meta.json").write_text(json.dumps(META))
    config = lift(policy_file(TEN_HZ), **{"env.env_meta": str(tmp_path / "meta.json")})
    reporter = Silent()
    with pytest.raises(InterruptedError):
        train(config, reporter)
    assert reporter.notices == [
        "env.env_meta differs from what the policy was made for: env_kwargs.control_freq 10 -> 20"
    ]


@pytest.mark.parametrize(
    ("spec", "task"),
    [
        (described("PickPlaceCan"), "Can"),
        (described("Knead"), "Knead"),
        (EnvSpec({"state": (4,)}, 2, 9, task="Toy"), "Toy"),
    ],
)
def test_the_task_is_the_policys_where_nobody_names_one(policy_file, tmp_path, spec, task):
    values = {"policy.checkpoint": policy_file(spec)}
    assert name_task(None, values)["env.task"] == task
    (tmp_path / "mine.yaml").write_text("env: {num_envs: 8}")
    assert name_task(str(tmp_path / "mine.yaml"), values)["env.task"] == task
    assert name_task("lift", values) is values
    assert name_task(None, values | {"env.task": "Square"})["env.task"] == "Square"


def test_the_task_is_that_of_a_description_where_nobody_names_one(tmp_path):
    write_meta(tmp_path / "meta.json", described("PickPlaceCan"))
    assert name_task(None, {"env.env_meta": str(tmp_path / "meta.json")})["env.task"] == "Can"


def test_without_a_checkpoint_nothing_is_named():
    values = {"env.num_envs": 3}
    assert name_task(None, values) is values


def test_a_description_may_stand_in_the_configuration_itself():
    env = load_config("lift", {"env.env_meta": META}).env
    assert (env.env_meta, env.env_meta_file) == (META, None)
