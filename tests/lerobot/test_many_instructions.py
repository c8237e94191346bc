"""LeRobot's models read each observation's own instruction: a batch of several decides as one model for each does."""

from __future__ import annotations

import pytest
import torch
import transformers.utils.hub
from specs import spec_of
from test_smolvla import STEPS, N, noise_of, observe
from tiny_pi0 import float32, tiny_sizes, write_cache
from tiny_pi0 import write_policy as write_pi0
from tiny_smolvla import ACTION_DIM, CHUNK, STATE_DIM, write_policy, write_vlm

from asyncflow.config.sections import PolicyConfig
from asyncflow.envs.tasks import join_tasks
from asyncflow.policies import make_policy

TEXTS = ["reach the goal", "push"]  # of different lengths
TASKS = torch.tensor([1, 0, 1])  # [N]


@pytest.fixture(scope="module", params=["smolvla", "pi0"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "smolvla":
        yield write_policy(path, write_vlm(tmp_path_factory.mktemp("vlm")))
        return
    cache = write_cache(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as monkeypatch, tiny_sizes():
        monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(cache))
        with float32():
            write_pi0(path)
        yield path


def build(folder, texts, **keys):
    """Return a policy for tasks with these instructions."""
    specs = [spec_of((STATE_DIM,), ACTION_DIM, {"top": (3, 28, 28)}, instruction=text) for text in texts]
    spec = specs[0] if len(specs) == 1 else join_tasks(specs, texts)
    own = {"horizon": CHUNK, "n_action_steps": 2, "num_inference_steps": STEPS, "critic_hidden_sizes": [8]}
    return make_policy(PolicyConfig(kind="lerobot", checkpoint=str(folder), **own, **keys), spec, 0)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_batch_of_instructions_decides_and_values_as_a_model_for_each(folder, is_frozen):
    policy, obs = build(folder, TEXTS, freeze_backbone=is_frozen), observe("top").set("task", TASKS)
    encoded, noise = policy.encode_obs(obs), noise_of(policy)
    batch = policy.sample_actions(encoded, "train", noise).set("obs", encoded)
    again = policy.default_forward(batch)
    torch.testing.assert_close(again["log_probs"], batch["log_probs"], rtol=0, atol=1e-5)
    for row, task in enumerate(TASKS.tolist()):
        alone = build(folder, [TEXTS[task]], freeze_backbone=is_frozen)
        alone.load_state_dict(policy.state_dict())
        expected = alone.sample_actions(alone.encode_obs(observe("top")), "train", noise)
        for name in ("actions", "log_probs", "values"):
            torch.testing.assert_close(batch[name][row], expected[name][row], rtol=0, atol=2e-5)


def test_instructions_decide(folder):
    policy, obs = build(folder, TEXTS), observe("top").set("task", TASKS)
    swapped = obs.clone().set("task", 1 - TASKS)
    first, second = (policy.sample_actions(o, "eval", noise_of(policy))["actions"] for o in (obs, swapped))
    assert ((first - second).abs().flatten(1).amax(1) > 1e-4).all()
    assert len(first) == N


def test_instructions_of_one_length_keep_the_prefix_of_a_single_one(folder):
    """No padding: nothing has to be left out."""
    policy = build(folder, ["reach the goal", "push the goal"])
    prefix = policy.make_context(observe("top").set("task", TASKS))
    assert isinstance(prefix, torch.Tensor) or "is_token" not in prefix.keys()  # noqa: SIM118
