"""LoRA adapters beside a backbone's linear layers."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from silent import TOY, Silent
from specs import spec_of
from tensordict import TensorDict

from asyncflow.config.presets import load_config
from asyncflow.config.sections import PolicyConfig, VLAConfig
from asyncflow.errors import ConfigError
from asyncflow.policies import make_policy
from asyncflow.rollout.weights import changing_tensors
from asyncflow.run.launch import train
from asyncflow.seeding import policy_noise

N = 4
LORA = TOY | {"policy.vla.lora_rank": 2, "trainer.total_updates": 3}
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the extra `lora`")


def build(**keys):
    config = PolicyConfig(kind="vla", critic_hidden_sizes=[16], vla=VLAConfig(instruction="lift", **keys))
    return make_policy(
        config,
        spec_of((4,), 2, {"top": (3, 28, 28)}),
        seed=0,
    )


def act(policy):
    images = torch.full((N, 3, 28, 28), 77, dtype=torch.uint8)
    obs = TensorDict({"state": torch.linspace(-1, 1, 16).view(N, 4), "images": {"top": images}}, [N])
    return policy.sample_actions(obs, "train", policy_noise(0, range(N), 0, policy.noise_size)).set("obs", obs)


def trainable(policy):
    return {name for name, p in policy.named_parameters() if p.requires_grad}


@needs_peft
def test_adapters_are_all_that_trains_of_the_backbone():
    whole, adapted = build(), build(lora_rank=2)
    of_backbone = {name for name in trainable(adapted) if ".backbone." in name}
    assert of_backbone
    assert all("lora_" in name for name in of_backbone)
    others = {name for name in trainable(whole) if ".backbone." not in name}
    assert {name for name in trainable(adapted) if ".backbone." not in name} == others
    assert set(changing_tensors(adapted)) == trainable(adapted) | {name for name, _ in adapted.named_buffers()}


@needs_peft
def test_an_adapter_adds_nothing_at_first_and_the_ratio_is_one():
    """The adapters' own random numbers come last, so that both have the same weights elsewhere."""
    whole, adapted = build(), build(lora_rank=2)
    batch = act(adapted)
    assert torch.equal(batch["actions"], act(whole)["actions"])
    torch.testing.assert_close(adapted.default_forward(batch)["log_probs"], batch["log_probs"], rtol=0, atol=1e-5)


@needs_peft
def test_targets_choose_the_layers():
    adapted = build(lora_rank=2, lora_targets=["query"])
    of_backbone = {name for name in trainable(adapted) if ".backbone." in name}
    assert of_backbone
    assert all(".query.lora_" in name for name in of_backbone)
    with pytest.raises(ConfigError, match=r"policy.vla.lora_targets = \['nowhere'\]: .*not found"):
        build(lora_rank=2, lora_targets=["nowhere"])


@needs_peft
@pytest.mark.parametrize("lag", [0, 1])
def test_vla_equals_standard_with_adapters(tmp_path, lag):
    runs = []
    for mode in ("vla", "standard"):
        changes = {"trainer.buffer_type": mode, "logging.out": str(tmp_path / mode), "buffer.max_policy_lag": lag}
        runs.append(train(load_config("toy_vla_tiny", LORA | changes), Silent()).trainer.policy)
    assert all(torch.equal(a, b) for a, b in zip(*(policy.parameters() for policy in runs), strict=True))
    moved = [p for name, p in runs[0].named_parameters() if "lora_B" in name]
    assert all(p.abs().sum() > 0 for p in moved)  # they begin at zero


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"lora_rank = 2 needs the package peft: pip install 'asyncflow\[lora\]'"):
        build(lora_rank=2)


def test_a_frozen_backbone_has_no_adapters():
    with pytest.raises(ConfigError, match=r"policy.freeze_backbone = true with policy.vla.lora_rank = 2"):
        load_config("toy_vla_tiny", {"policy.freeze_backbone": True, "policy.vla.lora_rank": 2})
