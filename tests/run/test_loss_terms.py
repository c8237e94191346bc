"""Runs with every optional term and schedule of PPO on: equal in both modes, resumed exactly, counted in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from silent import TOY, assert_equal, go_on, outcome, record, start

from asyncflow.config.presets import load_config
from asyncflow.demos.dataset import read_dataset
from asyncflow.errors import ConfigError
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import load_policy_file
from asyncflow.ppo.auxiliary import BehaviorCloning
from asyncflow.rollout.plan import plan_ring
from asyncflow.run.auxiliary import build_losses, check_auxiliary, kept_bytes
from asyncflow.run.build import check_start
from asyncflow.run.checkpoint import list_checkpoints, load_checkpoint
from asyncflow.run.state import read_snapshots
from asyncflow.simulators.spec import EnvSpec

TERMS = [
    {"kind": "bc", "weight": 0.5, "schedule": "linear", "capacity": 24, "batch_size": 8},
    {"kind": "reference_kl", "weight": 0.3, "schedule": "cosine", "schedule_updates": 4},
]
EVERYTHING = TOY | {
    "algorithm.auxiliary": TERMS,
    "algorithm.reward_scaling": True,
    "algorithm.ema_decay": 0.5,
    "algorithm.lr_schedule": "cosine",
    "algorithm.lr_warmup_updates": 2,
    "algorithm.learning_rate": 0.001,
    "env.horizon": 14,
}
GAUSSIAN: dict[str, Any] = {"policy.kind": "gaussian", "policy.log_prob": "joint_sum"}
FLOW: dict[str, Any] = {
    "policy.kind": "flow",
    "policy.log_prob": "per_step",
    "policy.hidden_sizes": [32],
    "algorithm.clip_coef_base": 0.001,
    "algorithm.denoising_discount": 0.9,
}


@pytest.mark.parametrize("policy", [GAUSSIAN, FLOW], ids=["gaussian", "flow"])
def test_vla_equals_standard_with_every_term_on(tmp_path: Path, policy: dict[str, Any]) -> None:
    changes = EVERYTHING | policy | {"buffer.max_policy_lag": 1}
    runs = [record(tmp_path / kind, "toy", changes | {"trainer.buffer_type": kind}) for kind in ("vla", "standard")]
    (tensors, batches, rows), (other_tensors, other_batches, other_rows) = runs
    assert all(torch.equal(a, b) for a, b in zip(tensors, other_tensors, strict=True))
    for a, b in zip(batches, other_batches, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.flatten_keys().values(), b.flatten_keys().values(), strict=True))
    assert rows == other_rows
    assert rows[-1]["train/reference_kl_loss"] > 0
    assert any(row["train/bc_loss"] != 0 for row in rows)


@pytest.mark.parametrize("policy", [GAUSSIAN, FLOW], ids=["gaussian", "flow"])
def test_a_cut_and_resumed_run_equals_the_uncut_one_with_every_term_on(tmp_path: Path, policy: dict[str, Any]) -> None:
    """The first policy, the successes, the scale of rewards and the averaged weights survive."""
    changes = EVERYTHING | policy | {"trainer.buffer_type": "vla", "buffer.max_policy_lag": 1}
    changes |= {"trainer.eval_interval": 2, "trainer.eval_episodes": 6}
    start(tmp_path / "uncut", "toy", changes)
    start(tmp_path / "cut", "toy", changes, stop_at=3)
    kept = load_checkpoint(list_checkpoints(tmp_path / "cut")[-1]).groups["optimizer"]
    owners = {name.rpartition("|")[0] for name in kept} - {""}
    assert owners == {"auxiliary|bc", "auxiliary|reference_kl", "reward_scale"}
    go_on(tmp_path / "cut")
    assert_equal(outcome(tmp_path / "uncut"), outcome(tmp_path / "cut"))


def test_checkpoints_decide_with_the_averaged_weights_and_the_run_goes_on_with_its_own(tmp_path: Path) -> None:
    start(tmp_path / "run", "toy", TOY | GAUSSIAN | {"algorithm.ema_decay": 0.9, "algorithm.learning_rate": 0.01})
    newest = list_checkpoints(tmp_path / "run")[-1]
    checkpoint = load_checkpoint(newest)
    own = read_snapshots(checkpoint.groups)[checkpoint.state.updates]
    decides = load_policy_file(newest / "policy.safetensors").tensors
    trained = [name for name in own if name.startswith(("actor.", "critic."))]
    assert not any(torch.equal(own[name], decides[name]) for name in trained)
    start(tmp_path / "plain", "toy", TOY | GAUSSIAN | {"algorithm.learning_rate": 0.01})
    plain = load_checkpoint(list_checkpoints(tmp_path / "plain")[-1])
    assert all(torch.equal(plain.policy[name], own[name]) for name in trained)


def write(path: Path) -> Path:
    """Write two demonstrations of Lift in robomimic's layout, of random numbers."""
    rng = np.random.default_rng(0)
    sizes = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps(
            {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": ["Panda"]}}
        )
        for name in ("demo_0", "demo_1"):
            file[f"data/{name}/actions"] = rng.uniform(-0.5, 0.5, (5, 7))
            for key, size in sizes.items():
                file[f"data/{name}/obs/{key}"] = rng.normal(size=(5, size))
    return path


def lift(dataset: Path, **changes: Any) -> Any:
    terms = [{"kind": "bc", "weight": 0.5, "dataset": str(dataset)}]
    return load_config("lift", {"algorithm.auxiliary": terms, "policy.checkpoint": None, **changes})


def test_a_dataset_that_does_not_exist_is_found_before_simulators_are_built(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.auxiliary\[0\]\.dataset = .*none\.hdf5: no such file"):
        check_start(lift(tmp_path / "none.hdf5", **{"logging.out": str(tmp_path / "run")}))


def test_a_datasets_path_is_kept_as_an_absolute_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may go on from another folder."""
    write(tmp_path / "demos.hdf5")
    monkeypatch.chdir(tmp_path)
    assert lift(Path("demos.hdf5")).algorithm.auxiliary[0].dataset == str(tmp_path / "demos.hdf5")


def build(config: Any, state_dim: int = 19) -> tuple[Any, EnvSpec]:
    spec = EnvSpec({"state": (state_dim,)}, action_dim=7, horizon=10)
    return make_policy(config.policy, spec, seed=0), spec


def test_demonstrations_of_a_dataset_are_imitated(tmp_path: Path) -> None:
    config = lift(write(tmp_path / "demos.hdf5"))
    policy, spec = build(config)
    [loss] = build_losses(config, policy, spec)
    assert isinstance(loss, BehaviorCloning)
    assert (loss.weight, loss.batch_size) == (0.5, 256)
    assert loss.demonstrations is not None
    obs, actions = loss.demonstrations.pick(torch.tensor([0, 3]))
    demos = read_dataset(tmp_path / "demos.hdf5", config.env)
    assert torch.equal(obs["state"], demos.obs["state"][0][[0, 3]])
    assert torch.equal(actions[:, 0], demos.actions[0][[0, 3]])
    obs, actions = loss.demonstrations.pick(torch.arange(len(loss.demonstrations)))
    assert bool(policy.imitation_loss(obs, actions, torch.Generator()).isfinite())


def test_a_dataset_of_other_observations_is_refused(tmp_path: Path) -> None:
    config = lift(write(tmp_path / "demos.hdf5"))
    policy, spec = build(config, state_dim=12)
    with pytest.raises(
        ConfigError, match=r"has \{'state': \[19\], 'actions': \[7\]\}, .* environments \{'state': \[12\]"
    ):
        build_losses(config, policy, spec)


def test_a_dataset_is_refused_where_the_policy_has_names_of_its_own(tmp_path: Path) -> None:
    mapping = {"policy.mapping.obs.state": [{"key": "object"}]}
    config = lift(write(tmp_path / "demos.hdf5"), **mapping)
    with pytest.raises(ConfigError, match=r"with policy\.mapping\.obs\.state: a dataset has the simulator's names"):
        check_auxiliary(config)


def test_what_terms_and_averages_keep_is_counted(tmp_path: Path) -> None:
    config = load_config("toy", EVERYTHING | GAUSSIAN)
    spec = EnvSpec({"state": (4,)}, action_dim=2, horizon=14)
    policy = make_policy(config.policy, spec, seed=0)
    plan = plan_ring(policy, spec, num_envs=4, num_steps=8, num_slots=1)
    trained = sum(parameter.nbytes for parameter in policy.parameters())
    reference = trained + sum(buffer.nbytes for buffer in policy.buffers())
    successes = 24 * (4 * 4 + config.policy.horizon * 2 * 4)
    assert kept_bytes(config.algorithm, policy, plan) == 2 * trained + reference + 2 * successes
    assert kept_bytes(load_config("toy", TOY).algorithm, policy, plan) == 0
