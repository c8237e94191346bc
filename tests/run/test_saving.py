"""What a model from elsewhere holds is saved and comes back, or is refused before the first step."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from silent import TOY, Silent, assert_equal, outcome
from torch import Tensor, nn

from asyncflow.config.presets import load_config, parse_overrides
from asyncflow.config.sections import PolicyConfig
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import FORMAT, check_saving, load_policy_file, save_policy
from asyncflow.run.evaluate_file import evaluate_checkpoint
from asyncflow.run.folder import resume_config
from asyncflow.run.launch import resume, train
from asyncflow.simulators.spec import EnvSpec

SHORT = TOY | {"policy.horizon": 2, "policy.n_action_steps": 2, "trainer.total_updates": 2, "trainer.save_interval": 1}


class Plain(nn.Module):
    """A Gaussian with its own log-probs."""

    def __init__(self, day: Any = None) -> None:
        super().__init__()
        self.first, self.second, self.value_head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def mean(self, obs: Any) -> Tensor:
        return self.second(self.first(obs["state"]).tanh()).view(-1, 2, 2)

    def forward(self, obs: Any) -> Tensor:
        noise = obs["noise"].view(-1, 2, 2) if "noise" in obs.keys() else 0.0  # noqa: SIM118
        return self.mean(obs) + 0.5 * noise

    def get_value(self, obs: Any) -> Tensor:
        return self.value_head(obs["state"]).squeeze(-1)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> dict[str, Tensor]:
        normal = torch.distributions.Normal(self.mean(obs)[:, : actions.shape[1]], 0.5)
        return {"log_probs": normal.log_prob(actions).sum((1, 2))}


class Tied(Plain):
    """One weight under two names, and a buffer that is a part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.second.weight = self.first.weight
        self.register_buffer("whole", torch.arange(6.0))
        self.register_buffer("part", self.whole[2:4])


class Repeated(Plain):
    """A buffer whose numbers are one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ones", torch.ones(1).expand(3))


class Infinite(Plain):
    """Starts with a number that every reader of its checkpoint would refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("limit", torch.tensor([torch.inf]))


class Extra(Plain):
    """Keeps something beside its tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"step": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


class Sparse(Plain):
    """Has a tensor that safetensors does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.eye(3).to_sparse())


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "elsewhere", sys.modules[__name__])


def load(folder: Any, name: str, **keys: Any) -> Any:
    changes = {"policy.vla.model_class": f"elsewhere.{name}", "logging.out": str(folder)}
    return load_config("toy_vla_tiny", SHORT | changes | keys)


def test_tied_weights_are_saved_once_and_come_back_under_both_names(tmp_path):
    done = train(load(tmp_path / "run", "Tied"), Silent())
    path = tmp_path / "run/checkpoints/last/policy.safetensors"
    own, file = done.trainer.policy.state_dict(), load_policy_file(path)
    assert {name: tensor.tolist() for name, tensor in file.tensors.items()} == {k: t.tolist() for k, t in own.items()}
    assert path.read_bytes().count(b"model.second.weight") == 1  # in the header alone


def test_a_run_with_tied_weights_goes_on_as_if_it_was_never_cut(tmp_path):
    for name, updates in (("uncut", 4), ("cut", 2)):
        train(load(tmp_path / name, "Tied", **{"trainer.total_updates": updates}), Silent())
    resume(tmp_path / "cut", resume_config(tmp_path / "cut", {"trainer.total_updates": 4}), Silent())
    assert_equal(outcome(tmp_path / "cut"), outcome(tmp_path / "uncut"))


def test_tied_weights_are_evaluated_as_they_were_trained(tmp_path):
    config = load(tmp_path / "run", "Tied", **{"trainer.eval_interval": 2, "trainer.eval_episodes": 4})
    reporter = Silent()
    train(config, reporter)
    found = evaluate_checkpoint(str(tmp_path / "run"), config, 4)
    assert found.as_metrics().items() <= reporter.rows[-1].items()


def test_a_file_that_shares_what_it_does_not_hold_is_damaged(tmp_path):
    policy = make_policy(PolicyConfig(), EnvSpec({"state": (4,)}, 2, 10), 0)
    save_policy(tmp_path / "file", policy, PolicyConfig(), EnvSpec({"state": (4,)}, 2, 7))
    with safe_open(tmp_path / "file", "pt") as opened:
        header = json.loads(opened.metadata()[FORMAT])
    save_file(load_file(tmp_path / "file"), tmp_path / "file", {FORMAT: json.dumps(header | {"shared": {"a": "b"}})})
    with pytest.raises(CheckpointError, match="shared must map names to tensors"):
        load_policy_file(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Extra", r"elsewhere.Extra: its state_dict holds model._extra_state, a dict \(get_extra_state\)"),
        ("Repeated", r"elsewhere.Repeated: its state_dict holds model.ones, whose numbers share memory"),
        ("Infinite", r"elsewhere.Infinite: holds NaN or inf in model.limit"),
        (
            "Sparse",
            r"elsewhere.Sparse: its state_dict holds model.graph, a tensor of torch.float32, torch.sparse_coo",
        ),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_first_step(tmp_path, name, said):
    with pytest.raises(ConfigError, match=said) as caught:
        train(load(tmp_path / "run", name), Silent())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "{day: 2026-11-01}",
            r"policy.vla.model_config.day = datetime.date\(2026, 11, 1\): a checkpoint could not keep",
        ),
        ("{sizes: [1, {2: x}]}", r"policy.vla.model_config.sizes\[1\]: key 2"),
        ("{names: !!set {a}}", r"policy.vla.model_config.names = \{'a'\}"),
        ("{scale: .nan}", r"policy.vla.model_config.scale = nan"),
        ("{deep: &a [*a]}", r"policy.vla.model_config"),
    ],
)
def test_arguments_that_a_file_would_not_give_back_are_refused(text, said):
    with pytest.raises(ConfigError, match=said) as caught:
        load_config("toy_vla_tiny", parse_overrides([f"policy.vla.model_config={text}"]))
    assert "\n" not in str(caught.value)


def test_a_description_that_is_no_json_is_refused():
    spec = EnvSpec({"state": (4,)}, 2, 7, task="Mine", env_meta={"call": print})
    policy = make_policy(PolicyConfig(), EnvSpec({"state": (4,)}, 2, 10), 0)
    with pytest.raises(ConfigError, match=r"env.task = Mine: its spec \(EnvSpec\) cannot be stored as JSON"):
        check_saving(policy, PolicyConfig(), spec)


def test_the_toy_can_be_saved():
    check_saving(make_policy(PolicyConfig(), EnvSpec({"state": (4,)}, 2, 10), 0), PolicyConfig(), ToyVecEnv(1, 1).spec)
