"""Images in a policy: shapes, shifts, and what every policy promises of its decisions, whatever it sees."""

import pytest
import torch
from camera_promises import (
    assert_every_camera_moves_decision_and_value,
    assert_ratio_is_one_in_every_minibatch_shape,
    assert_the_value_teaches_the_critic_alone_and_the_decision,
    decide,
)
from specs import spec_of
from tensordict import TensorDict
from torch.nn import functional

from asyncflow.config.sections import PolicyConfig
from asyncflow.errors import ConfigError
from asyncflow.policies import make_policy
from asyncflow.policies.networks.image_encoder import NUM_KEYPOINTS, ImageEncoder, SpatialSoftmax, random_shift
from asyncflow.simulators.spec import EnvSpec

N, D, A, SIZE = 6, 5, 3, (36, 40)
SPEC = spec_of((D,), A, dict.fromkeys(("left", "right"), (3, *SIZE)))
KEYS = {"horizon": 4, "n_action_steps": 2, "hidden_sizes": [32], "critic_hidden_sizes": [16], "log_prob": "joint_sum"}
CASES = [(kind, steps, encoder) for kind in ("flow", "gaussian") for steps in (1, 2) for encoder in ("small",)]
CASES.append(("flow", 1, "resnet18"))


def make_obs(spec: EnvSpec, seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    obs = spec.empty_obs(N)
    obs["state"] = torch.randn(obs["state"].shape, generator=generator)
    for camera, images in obs["images"].items():
        obs["images", camera] = torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8)
    return obs


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request):
    kind, n_obs_steps, encoder = request.param
    spec = SPEC.with_history(n_obs_steps)
    config = PolicyConfig(kind=kind, image_encoder=encoder, **KEYS)
    return make_policy(config, spec, seed=1), make_obs(spec)


def test_ratio_is_one_before_any_optimizer_step_in_every_minibatch_shape(case):
    assert_ratio_is_one_in_every_minibatch_shape(*case)


def test_ratio_is_one_whether_or_not_the_policy_is_in_training_mode(case):
    policy, obs = case
    batch = decide(policy.eval(), obs)
    torch.testing.assert_close(
        policy.train().default_forward(batch)["log_probs"], batch["log_probs"], rtol=0, atol=1e-5
    )


def test_every_camera_moves_the_decision_and_the_value(case):
    assert_every_camera_moves_decision_and_value(*case, "images", lambda image: 255 - image)


def test_the_value_teaches_the_critic_alone_and_the_decision_the_encoder(case):
    assert_the_value_teaches_the_critic_alone_and_the_decision(*case, case[0].image_encoder)


def test_images_stay_bytes_where_they_are_stored(case):
    policy, obs = case
    stored = obs.clone()
    assert decide(policy, obs)["obs", "images", "left"].dtype == torch.uint8
    assert torch.equal(obs["images", "left"], stored["images", "left"])


def test_weights_depend_on_the_seed_alone():
    config = PolicyConfig(**KEYS)
    first, again, other = (make_policy(config, SPEC, s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kind", ["small", "resnet18"])
def test_an_encoder_has_no_batch_statistics_and_gives_each_camera_its_keypoints(kind):
    encoder = ImageEncoder(kind, {"left": (3, 84, 84)})
    features = encoder(TensorDict({"left": torch.zeros(2, 3, 84, 84, dtype=torch.uint8)}, [2]))
    assert features.shape == (2, encoder.num_features) == (2, 2 * NUM_KEYPOINTS)
    assert list(encoder.buffers()) == []


@pytest.mark.parametrize(("kind", "size"), [("small", 10), ("resnet18", 33)])
def test_the_smallest_images_that_are_taken_still_show_where_something_is(kind, size):
    encoder = ImageEncoder(kind, {"left": (3, size, size)})
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    images[1, :, -size // 3 :, -size // 3 :] = 255
    features = encoder(TensorDict({"left": images}, [2]))
    assert not torch.allclose(features[0], features[1])


def test_images_of_one_cell_are_refused():
    with pytest.raises(
        ConfigError, match=r"resnet18 needs images of more than 32 pixels a side, got 32; .*camera_size"
    ):
        ImageEncoder("resnet18", {"left": (3, 32, 84)})


def test_a_spatial_softmax_finds_where_a_feature_is():
    softmax = SpatialSoftmax(1)
    torch.nn.init.constant_(softmax.keypoints.weight, 100.0)
    torch.nn.init.zeros_(softmax.keypoints.bias)
    features = torch.zeros(1, 1, 5, 9)
    features[0, 0, 1, 6] = 1.0
    found = softmax(features)[0]
    torch.testing.assert_close(found, torch.tensor([0.5, -0.5]).repeat_interleave(NUM_KEYPOINTS))


def test_a_random_shift_is_the_crop_of_an_image_with_repeated_borders():
    images = torch.randint(0, 256, (3, 2, 3, 10, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([[0, 0], [2, -3], [-4, 4]])
    shifted = random_shift(images, offsets)
    assert shifted.dtype == torch.uint8
    for image, (down, right), result in zip(images, offsets.tolist(), shifted, strict=True):
        padded = functional.pad(image.float(), (4, 4, 4, 4), mode="replicate")
        crop = padded[..., 4 - down : 14 - down, 4 - right : 16 - right]
        assert torch.equal(result.float(), crop)
