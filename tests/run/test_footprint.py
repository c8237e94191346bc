"""Sizes beyond the machine are counted, and refused in one line, before anything is allocated or built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from silent import Silent

from asyncflow.config.presets import load_config
from asyncflow.config.sections import PolicyConfig
from asyncflow.errors import ConfigError
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import load_policy_file, save_policy
from asyncflow.run import evaluate_file as evaluate_checkpoint
from asyncflow.run import parts
from asyncflow.run.launch import train
from asyncflow.simulators.spec import EnvSpec

MILLION, BILLION, MOST = 10**6, 10**9, 2**63 - 1


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("lift", {"env.num_envs": BILLION, "buffer.buffer_size": BILLION}),
        ("toy", {"env.num_envs": BILLION, "buffer.buffer_size": BILLION}),
        ("toy", {"policy.hidden_sizes": [MILLION, MILLION]}),
        ("toy", {"policy.critic_hidden_sizes": [MOST]}),
        ("toy", {"policy.horizon": 1000 * MILLION}),
        ("toy", {"policy.horizon": MOST}),
        ("lift", {"env.n_obs_steps": MILLION, "policy.checkpoint": None}),
        ("lift", {"buffer.buffer_size": 960 * BILLION}),
    ],
)
def test_sizes_beyond_the_machine_are_refused_before_anything_is_built(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, preset: str, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(parts, "make_vec_env", lambda *_: pytest.fail("environments were built"))
    config = load_config(preset, changes | {"logging.out": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"are needed, .* are free; lower|beyond what can be counted; lower"):
        train(config, Silent())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change", [{"hidden_sizes": [9000, 9000]}, {"horizon": 10**7}, {"critic_hidden_sizes": [MOST]}]
)
def test_a_file_cannot_ask_for_a_larger_policy_than_it_holds(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setattr(evaluate_checkpoint, "make_vec_env", lambda *_: pytest.fail("environments were built"))
    config, spec = PolicyConfig(hidden_sizes=[8], critic_hidden_sizes=[8]), EnvSpec({"state": (4,)}, 2, 40, task="Toy")
    path = tmp_path / "policy.safetensors"
    save_policy(path, make_policy(config, spec, 0), config.model_copy(update=change), spec)
    assert load_policy_file(path).policy_config.kind == "flow"
    with pytest.raises(ConfigError, match=r"of which the checkpoint holds|beyond what can be counted"):
        evaluate_checkpoint.evaluate_checkpoint(str(path), load_config("toy"), 1)


def test_what_is_large_and_fits_is_built() -> None:
    config = PolicyConfig(hidden_sizes=[8], critic_hidden_sizes=[17, MILLION // 1000, 17])
    assert make_policy(config, EnvSpec({"state": (4,)}, 2, 10), 0).critic[0].weight.device == torch.device("cpu")
