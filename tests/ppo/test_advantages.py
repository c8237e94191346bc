"""Which estimator an update uses, and what PPO's constructor takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from silent import TOY, Silent
from tensordict import TensorDict
from torch import Tensor

from asyncflow.config.presets import load_config
from asyncflow.config.sections import AlgorithmConfig, PolicyConfig
from asyncflow.errors import ConfigError, ContractError
from asyncflow.policies import make_policy
from asyncflow.ppo.gae import Transitions
from asyncflow.ppo.ppo import PPO
from asyncflow.ppo.settings import PPOSettings
from asyncflow.rollout.ring import Rollout, RolloutInfo
from asyncflow.run.build import check_start
from asyncflow.run.launch import train
from asyncflow.simulators.spec import EnvSpec

EXAMPLES = Path(__file__).parents[2] / "examples"
POINTS = """[asyncflow.advantages]
mean_of_the_others = my_advantage:from_config
nothing = builtins:print
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example, as a package that registers it would be installed."""
    metadata = tmp_path / "site" / "my_advantage-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-advantage\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(EXAMPLES))


def make_ppo(*arguments: Any, **settings: Any) -> PPO:
    config = PolicyConfig(kind="gaussian", horizon=2, n_action_steps=2, hidden_sizes=[8], critic_hidden_sizes=[8])
    return PPO(make_policy(config, EnvSpec({"state": (3,)}, 2, 10), seed=0), *arguments, **settings)


def make_rollout(ppo: PPO) -> Rollout:
    """Return 3 decisions of 2 environments with rewards 0 to 5; nothing ends."""
    obs = TensorDict({"state": torch.zeros(4, 2, 3)}, [4, 2])
    decision = ppo.policy.sample_actions(obs[:3].flatten(0, 1), "train", torch.zeros(6, ppo.policy.noise_size))
    data = decision.view(3, 2)
    false = torch.zeros(3, 2, dtype=torch.bool)
    data.update({"rewards": torch.arange(6.0).view(3, 2), "discounts": torch.full((3, 2), 0.5), "terminated": false})
    data.update({"truncated": false, "valid": ~false, "final_index": torch.zeros(3, 2, dtype=torch.int64)})
    data["executed"] = torch.full((3, 2), 2)
    return Rollout(0, 0, RolloutInfo(0), data, obs, obs[:1])


def test_the_example_is_trained_by_name(installed: None, tmp_path: Path) -> None:
    changes = TOY | {"algorithm.advantage": "mean_of_the_others", "logging.out": str(tmp_path / "run")}
    reporter = Silent()
    train(load_config("toy", changes), reporter)
    assert reporter.rows[-1]["updates"] == TOY["trainer.total_updates"]
    assert reporter.rows[-1]["train/nonfinite_skipped"] == 0


def test_the_examples_advantage_is_by_how_much_an_environment_beats_the_others(installed: None) -> None:
    ppo = make_ppo(advantage="mean_of_the_others", normalize_advantages=False, num_minibatches=1)
    with torch.no_grad():  # V is 0
        for parameter in ppo.policy.critic_parameters():
            parameter.zero_()
    batch = ppo._prepare(make_rollout(ppo), 0).view(3, 2)
    decay = 0.5 * 0.95
    returns = [[0 + decay * (2 + decay * 4), 1 + decay * (3 + decay * 5)], [2 + decay * 4, 3 + decay * 5], [4, 5]]
    torch.testing.assert_close(batch["returns"], torch.tensor(returns))
    torch.testing.assert_close(batch["advantages"][:, 0], -batch["advantages"][:, 1])
    assert batch["advantages"][2].tolist() == [-1.0, 1.0]


def test_an_estimator_is_given_as_an_argument() -> None:
    def rewards_alone(transitions: Transitions) -> tuple[Tensor, Tensor]:
        return transitions.rewards, transitions.rewards + 1

    ppo = make_ppo(AlgorithmConfig(normalize_advantages=False, num_minibatches=1), advantage=rewards_alone)
    batch = ppo._prepare(make_rollout(ppo), 0)
    assert batch["advantages"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert batch["returns"].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_an_estimate_of_another_shape_is_refused_by_its_shape() -> None:
    ppo = make_ppo(advantage=lambda transitions: (transitions.rewards[0], transitions.rewards), num_minibatches=1)
    with pytest.raises(ContractError, match=r"shape \(2,\), .*expected advantages and returns, two .* \(3, 2\)"):
        ppo.update(make_rollout(ppo), 0, lambda: None)


def test_a_name_that_nobody_registered_is_refused_with_those_that_are(installed: None) -> None:
    with pytest.raises(ConfigError, match=r"algorithm.advantage = 'gea': expected gae, monte_carlo, n_step, mean_of"):
        make_ppo(advantage="gea")


def test_an_entry_point_that_builds_no_estimator_is_found_before_simulators_are_built(
    installed: None, tmp_path: Path
) -> None:
    config = load_config("toy", {"algorithm.advantage": "nothing", "logging.out": str(tmp_path / "run")})
    with pytest.raises(ContractError, match=r"entry point nothing .* returned None; expected asyncflow\.ppo"):
        check_start(config)


def test_settings_are_the_fields_of_the_configuration() -> None:
    arguments_of_their_own = {"advantage", "auxiliary"}
    assert PPOSettings.__annotations__.keys() == AlgorithmConfig.model_fields.keys() - arguments_of_their_own
    for name, annotation in PPOSettings.__annotations__.items():
        assert annotation.__forward_arg__ == AlgorithmConfig.__annotations__[name]


def test_settings_replace_those_of_a_configuration_and_leave_the_others() -> None:
    config = AlgorithmConfig(clip_coef=0.3, vf_coef=0.25)
    assert make_ppo(config, clip_coef=0.02).config == AlgorithmConfig(clip_coef=0.02, vf_coef=0.25)
    assert make_ppo(update_epochs=2).config == AlgorithmConfig(update_epochs=2)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"clip_coeff": 0.02}, "^unknown setting clip_coeff; did you mean clip_coef[?]$"),
        ({"clip": 0.02}, "^unknown setting clip; did you mean clip_coef[?]$"),
        ({"clip_coef": -1.0}, "^clip_coef = -1.0: input should be greater than 0$"),
        ({"update_epochs": "8"}, "^update_epochs = '8': input should be a valid integer$"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_ppo(**settings)


def test_seed_and_length_may_be_set_after_construction() -> None:
    """A trainer sets those that were left out."""
    first = make_ppo(lr_schedule="linear", seed=3, total_updates=4)
    later = make_ppo(lr_schedule="linear")
    later.seed, later.total_updates = 3, 4
    assert first.learning_rates(2) == later.learning_rates(2)
    assert first.learning_rates(2)["train/learning_rate"] == pytest.approx(0.5e-4)
    others = []
    for seed in (3, None, 1):
        ppo = make_ppo(num_minibatches=2, seed=seed)
        ppo.seed = 3 if seed is None else seed
        ppo.update(make_rollout(ppo), 1, lambda: None)
        others.append(torch.cat([p.detach().flatten() for p in ppo.policy.parameters()]))
    assert torch.equal(others[0], others[1])
    assert not torch.equal(others[0], others[2])
