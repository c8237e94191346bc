"""What every policy promises, whatever its noise method and log-prob mode."""

import copy

import pytest
import torch
from specs import spec_of
from tensordict import TensorDict

from asyncflow.config.sections import PolicyConfig
from asyncflow.errors import ConfigError
from asyncflow.policies import make_policy
from asyncflow.seeding import policy_noise
from asyncflow.simulators.spec import EnvSpec

STATE_DIM, ACTION_DIM, NUM_DECISIONS = 11, 3, 16
CAMERAS = {"front": (3, 28, 28), "wrist": (3, 14, 28)}

FLOWS = [
    {"noise_method": method, "log_prob": mode, "learn_noise": learn}
    for method, learn in (("flow_sde", True), ("flow_cps", True), ("flow_noise", True), ("flow_noise", False))
    for mode in ("joint_sum", "joint_mean", "per_step", "single_step")
]
GAUSSIANS = [{"kind": "gaussian", "log_prob": mode} for mode in ("joint_sum", "joint_mean")]
VLAS = [
    {"kind": "vla", "noise_method": method, "log_prob": mode}
    for method, mode in (("flow_sde", "joint_mean"), ("flow_noise", "per_step"), ("flow_cps", "single_step"))
]
CONFIGS = [
    PolicyConfig(horizon=5, n_action_steps=3, noise_level=0.3, hidden_sizes=[64, 64], critic_hidden_sizes=[32], **keys)
    for keys in FLOWS + GAUSSIANS + VLAS
]


def _name(config):
    if config.kind == "gaussian":
        return f"gaussian-{config.log_prob}"
    prefix = "vla-" if config.kind == "vla" else ""
    return f"{prefix}{config.noise_method}-{config.log_prob}-{'learned' if config.learn_noise else 'fixed'}"


@pytest.fixture(params=CONFIGS, ids=_name)
def config(request):
    return request.param


@pytest.fixture
def policy(config):
    policy = make_policy(
        config,
        spec_of((STATE_DIM,), ACTION_DIM, CAMERAS),
        seed=1,
    )
    policy.obs_normalizer.set_range(-2 * torch.ones(STATE_DIM), torch.linspace(1, 3, STATE_DIM))
    policy.action_normalizer.set_range(-torch.ones(ACTION_DIM), torch.linspace(2, 3, ACTION_DIM))
    return policy


@pytest.fixture
def obs():
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(NUM_DECISIONS, STATE_DIM, generator=generator)
    images = {
        name: torch.randint(256, (NUM_DECISIONS, *shape), generator=generator).to(torch.uint8)
        for name, shape in CAMERAS.items()
    }
    return TensorDict({"state": state, "images": images}, batch_size=[NUM_DECISIONS])


@pytest.fixture
def noise(policy):
    return policy_noise(0, range(NUM_DECISIONS), 0, policy.noise_size)


@pytest.fixture
def batch(policy, obs, noise):
    return policy.sample_actions(obs, "train", noise).set("obs", obs)


def _num_terms(policy, config):
    steps = policy.sampler.num_stochastic if config.kind != "gaussian" else 1
    return steps * config.n_action_steps * ACTION_DIM


def test_stored_decision_has_the_shapes_of_the_contract(policy, config, batch):
    steps = (policy.sampler.num_stochastic,) if config.log_prob == "per_step" else ()
    assert batch["actions"].shape == (NUM_DECISIONS, config.horizon, ACTION_DIM)
    assert batch["log_probs"].shape == (NUM_DECISIONS, *steps)
    assert batch["values"].shape == (NUM_DECISIONS,)
    assert all(value.shape[0] == NUM_DECISIONS and not value.requires_grad for value in batch.values(True, True))


def test_ratio_is_one_before_any_optimizer_step(policy, batch):
    evaluated = policy.default_forward(batch)
    ratio = (evaluated["log_probs"] - batch["log_probs"]).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)
    torch.testing.assert_close(evaluated["values"], batch["values"], rtol=0, atol=1e-5)
    assert evaluated["entropy"].shape == (NUM_DECISIONS,)


def test_ratio_is_one_in_other_minibatch_shapes(policy, batch):
    log_probs = torch.cat([policy.default_forward(part)["log_probs"] for part in batch.split([1, 4, 11])])
    torch.testing.assert_close(log_probs.sub(batch["log_probs"]).exp(), torch.ones_like(log_probs), rtol=0, atol=1e-5)


def test_bfloat16_log_probs_agree_with_themselves_and_are_float32(policy, obs, noise):
    """Stated tolerance, in nats: 0.02 for a mean, 0.5 for a sum; on a CPU the difference stays below 0.001."""
    with torch.autocast("cpu", torch.bfloat16):
        batch = policy.sample_actions(obs, "train", noise).set("obs", obs)
        log_probs = torch.cat([policy.default_forward(part)["log_probs"] for part in batch.split([1, 15])])
    assert log_probs.dtype == batch["log_probs"].dtype == batch["values"].dtype == torch.float32
    tolerance = 0.5 if policy.log_prob_terms == 1 else 0.02
    torch.testing.assert_close(log_probs, batch["log_probs"], rtol=0, atol=tolerance)


def test_log_prob_terms_turn_log_probs_into_the_joint_sum(policy, config, obs, noise):
    if config.log_prob == "single_step":
        assert policy.log_prob_terms == 1
        return
    summed = make_policy(
        config.model_copy(update={"log_prob": "joint_sum"}),
        spec_of((STATE_DIM,), ACTION_DIM, CAMERAS),
        1,
    )
    summed.load_state_dict(policy.state_dict())
    joint = summed.sample_actions(obs, "train", noise)["log_probs"]
    own = policy.sample_actions(obs, "train", noise)["log_probs"].view(NUM_DECISIONS, -1).sum(1)
    torch.testing.assert_close(own * policy.log_prob_terms, joint, rtol=1e-5, atol=1e-4)
    assert policy.log_prob_terms == (_num_terms(policy, config) if config.log_prob == "joint_mean" else 1)


def test_actions_are_denormalized(policy, config, batch):
    normalised = batch["chains"][:, -1] if config.kind != "gaussian" else batch["raw_actions"]
    torch.testing.assert_close(batch["actions"], policy.action_normalizer.denormalize(normalised))


def test_default_forward_never_samples(policy, batch):
    before = torch.get_rng_state()
    first, second = policy.default_forward(batch), policy.default_forward(batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first.keys())  # noqa: SIM118 - TensorDict


def test_sampling_is_a_function_of_obs_and_noise(policy, obs, noise):
    before = torch.get_rng_state()
    first, second = (policy.sample_actions(obs, "train", noise) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert (first == second).all()


def test_a_row_does_not_depend_on_its_batch(policy, obs, noise):
    together = policy.sample_actions(obs, "train", noise)
    alone = policy.sample_actions(obs[5:6], "train", noise[5:6])
    for key, value in alone.items():
        torch.testing.assert_close(value, together[key][5:6], rtol=1e-4, atol=1e-5)


def test_eval_returns_only_actions_and_ignores_the_noise_of_steps(policy, obs, noise):
    other = noise.clone()
    other[:, policy.horizon * ACTION_DIM :] = 9.0
    first, second = (policy.sample_actions(obs, "eval", values) for values in (noise, other))
    assert list(first.keys()) == ["actions"]
    assert torch.equal(first["actions"], second["actions"])


def test_value_is_the_same_in_rollout_and_training(policy, obs, batch):
    assert torch.equal(policy.get_value(obs), batch["values"])
    assert torch.equal(policy.default_forward(batch)["values"], batch["values"])


def test_actor_and_critic_parameters_partition_and_all_actor_ones_learn(policy, batch):
    policy.default_forward(batch)["log_probs"].sum().backward()
    actor, critic = list(policy.actor_parameters()), list(policy.critic_parameters())
    assert len(actor) + len(critic) == len(list(policy.parameters()))
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in actor)
    assert all(parameter.grad is None for parameter in critic)


def test_critic_learns_from_values_alone(policy, batch):
    policy.default_forward(batch)["values"].sum().backward()
    assert all(parameter.grad is None for parameter in policy.actor_parameters())
    assert all(parameter.grad is not None for parameter in policy.critic_parameters())


def test_an_optimizer_step_moves_the_ratio(policy, batch):
    optimizer = torch.optim.SGD(policy.actor_parameters(), lr=1e-3)
    policy.default_forward(batch)["log_probs"].sum().backward()
    optimizer.step()
    assert not torch.allclose(policy.default_forward(batch)["log_probs"], batch["log_probs"], atol=1e-3)


def test_copies_are_independent(policy, batch):
    twin = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(twin.default_forward(batch)["log_probs"], batch["log_probs"], rtol=0, atol=1e-5)


def test_a_saved_policy_decides_the_same(policy, config, obs, noise):
    other = make_policy(
        config,
        spec_of((STATE_DIM,), ACTION_DIM, CAMERAS),
        2,
    )
    other.load_state_dict(policy.state_dict())
    assert (other.sample_actions(obs, "train", noise) == policy.sample_actions(obs, "train", noise)).all()


def test_seed_alone_sets_the_weights_and_the_global_generator_is_left_alone(config):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = (
        make_policy(
            config,
            spec_of((STATE_DIM,), ACTION_DIM, CAMERAS),
            seed,
        )
        for seed in (4, 4, 5)
    )
    assert torch.equal(torch.get_rng_state(), before)
    weights = [torch.nn.utils.parameters_to_vector(policy.parameters()) for policy in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_autocast", [False, True])
def test_acting_and_training_on_cuda_never_synchronise(policy, obs, noise, is_autocast):
    policy, obs, noise = policy.cuda(), obs.cuda(), noise.cuda()
    policy.sample_actions(obs, "train", noise)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=is_autocast):
            batch = policy.sample_actions(obs, "train", noise).set("obs", obs)
            evaluated = policy.default_forward(batch)
            policy.sample_actions(obs, "eval", noise)
            policy.anneal(1)
        evaluated["log_probs"].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = 0.5 if is_autocast else 1e-4
    torch.testing.assert_close(evaluated["log_probs"], batch["log_probs"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("shapes", [{}, {"image": (3, 84, 84)}, {"state": (3, 84, 84)}])
def test_a_missing_state_vector_is_a_config_error(shapes):
    with pytest.raises(ConfigError, match=r"policy.kind = flow needs a vector observation named `state`"):
        make_policy(PolicyConfig(), EnvSpec(shapes, ACTION_DIM, 10), seed=0)
