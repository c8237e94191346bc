"""asyncflow's own VLA: what the contract's tests do not say."""

from __future__ import annotations

import pytest
import torch
from specs import spec_of
from tensordict import TensorDict

from asyncflow.config.sections import PolicyConfig, VLAConfig
from asyncflow.errors import ConfigError
from asyncflow.policies import make_policy
from asyncflow.policies.vla.model import END, SIZES, VLAModel, VLAShape, tokenize
from asyncflow.seeding import policy_noise

N, STATE_DIM, ACTION_DIM = 6, 5, 2
CAMERAS = {"front": (3, 28, 28), "wrist": (3, 28, 14)}


def build(seed=0, cameras=CAMERAS, **keys):
    vla = {"instruction": "lift the cube"} | {k: keys.pop(k) for k in list(keys) if k in VLAConfig.model_fields}
    keys = {"horizon": 3, "n_action_steps": 2, "num_inference_steps": 4} | keys
    config = PolicyConfig(kind="vla", critic_hidden_sizes=[16], vla=VLAConfig(**vla), **keys)
    return make_policy(
        config,
        spec_of((STATE_DIM,), ACTION_DIM, cameras),
        seed,
    )


@pytest.fixture
def obs():
    generator = torch.Generator().manual_seed(0)
    images = {k: torch.randint(256, (N, *s), generator=generator).to(torch.uint8) for k, s in CAMERAS.items()}
    state = torch.randn(N, STATE_DIM, generator=generator)
    return TensorDict({"state": state, "images": images}, batch_size=[N])


def noise_of(policy):
    return policy_noise(0, range(N), 0, policy.noise_size)


def count_calls(policy):
    calls = []
    policy.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_base_has_half_a_billion_parameters():
    with torch.device("meta"):
        instructions = tokenize(["lift the cube"]).to("meta")
        shape = VLAShape({"front": (3, 84, 84), "wrist": (3, 84, 84)}, (19,), 8, 7, instructions, patch_size=14)
        model = VLAModel(SIZES["base"], shape, [256, 256])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.5e9, rel=0.02)


def test_the_prefix_is_encoded_once_per_decision_and_once_to_evaluate_it(obs):
    policy = build()
    calls = count_calls(policy)
    batch = policy.sample_actions(obs, "train", noise_of(policy)).set("obs", obs)
    assert len(calls) == 1
    policy.default_forward(batch)
    assert len(calls) == 2


def test_cached_denoising_equals_encoding_the_prefix_in_every_step(obs):
    policy = build()
    calls = count_calls(policy)

    def uncached(x, steps):
        return policy.velocity_field(policy.make_context(obs))(x, steps)

    noise = noise_of(policy)
    cached = policy.sample_actions(obs, "eval", noise)["actions"]
    assert len(calls) == 1
    with torch.no_grad():
        assert torch.equal(policy.sampler.denoise(uncached, noise), cached)
    assert len(calls) == 1 + 4


@pytest.mark.parametrize("mode", ["joint_sum", "joint_mean", "per_step", "single_step"])
def test_the_ratio_is_one_in_bfloat16_within_the_stated_tolerance(obs, mode):
    """Stated in docs/policies.md, in nats: 0.5 for a sum, 0.02 for a mean."""
    policy = build(dtype="bfloat16", log_prob=mode)
    batch = policy.sample_actions(obs, "train", noise_of(policy)).set("obs", obs)
    evaluated = torch.cat([policy.default_forward(part)["log_probs"] for part in batch.split([1, N - 1])])
    assert evaluated.dtype == batch["log_probs"].dtype == batch["values"].dtype == torch.float32
    torch.testing.assert_close(evaluated, batch["log_probs"], rtol=0, atol=0.02 if mode == "joint_mean" else 0.5)


def test_bfloat16_is_what_the_networks_compute_in(obs):
    with torch.no_grad():
        exact, rounded = (build(dtype=dtype).make_context(obs) for dtype in ("float32", "bfloat16"))
    assert 0 < (exact - rounded).abs().max() < 0.1
    assert all(p.dtype == torch.float32 for p in build(dtype="bfloat16").parameters())


def test_eval_is_deterministic(obs):
    policy = build()
    first, second = (policy.sample_actions(obs, "eval", noise_of(policy))["actions"] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("part", ["state", ("images", "front"), ("images", "wrist")])
def test_every_part_of_an_observation_moves_action_and_value(obs, part):
    policy = build()
    changed = obs.clone()
    changed[part] = 1 - obs[part] if part == "state" else 255 - obs[part]
    first, second = (policy.sample_actions(x, "train", noise_of(policy)) for x in (obs, changed))
    assert ((first["actions"] - second["actions"]).abs().amax((1, 2)) > 0).all()
    assert ((first["values"] - second["values"]).abs() > 0).all()


def test_the_instruction_moves_the_action_and_is_no_part_of_a_checkpoint(obs):
    lift, push = build(), build(instruction="push it")
    push.load_state_dict(lift.state_dict())
    first, second = (p.sample_actions(obs, "eval", noise_of(p))["actions"] for p in (lift, push))
    assert not torch.equal(first, second)


def test_an_instruction_is_its_bytes_and_an_end():
    assert tokenize(["lift", "go"]).tolist() == [[*b"lift", END], [*b"go", END, END, END]]
    with pytest.raises(ConfigError, match=r"policy.vla.instruction = .* is 128 bytes long, at most 127"):
        tokenize(["x", "x" * 128])


def test_a_patch_that_does_not_divide_a_picture_is_refused():
    with pytest.raises(ConfigError, match=r"patch_size = 14 must divide the 30 x 28 pictures of camera top"):
        build(cameras={"top": (3, 30, 28)})


def test_a_vla_without_cameras_sees_the_state_alone(obs):
    policy = build(cameras={})
    assert policy.sample_actions(obs.select("state"), "eval", noise_of(policy))["actions"].shape == (N, 3, ACTION_DIM)


def test_a_history_is_seen_frame_by_frame(obs):
    shapes = {"front": (2, 3, 28, 28)}
    config = PolicyConfig(kind="vla", horizon=3, n_action_steps=2, critic_hidden_sizes=[16])
    policy = make_policy(
        config,
        spec_of((2, STATE_DIM), ACTION_DIM, shapes),
        0,
    )
    states = torch.stack([obs["state"] - 1, obs["state"]], 1)
    images = {"front": torch.stack([255 - obs["images", "front"], obs["images", "front"]], 1)}
    first = TensorDict({"state": states, "images": images}, batch_size=[N])
    assert policy.make_context(first).shape == (N, 2 * 4 + 1 + 1, 64)
    batch = policy.sample_actions(first, "train", noise_of(policy)).set("obs", first)
    torch.testing.assert_close(policy.default_forward(batch)["log_probs"], batch["log_probs"], rtol=0, atol=1e-5)
    for part in ("state", ("images", "front")):
        swapped = first.clone()
        swapped[part] = first[part].flip(1)
        assert not torch.equal(policy.sample_actions(swapped, "train", noise_of(policy))["actions"], batch["actions"])
