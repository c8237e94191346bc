"""The flow's denoising steps, against published numbers and torch.distributions."""

import math

import pytest
import torch
from torch.distributions import Normal

from asyncflow.config.sections import PolicyConfig
from asyncflow.errors import ConfigError
from asyncflow.policies.flow_sampler import FlowSampler, floor_std, step_grid, step_weights, transition, uniform_index

# (t, std, w0, w1) of flow_sde with a = 0.5, pi_RL (arXiv:2510.25889).
FLOW_SDE = {
    4: [(1, 0.5, 0.25, 0.625), (0.75, 0.4330, 0.5, 0.375), (0.5, 0.25, 0.75, 0.1875), (0.25, 0.1443, 1, -0.0417)],
    5: [
        (1, 0.5, 0.2, 0.675),
        (0.8, 0.4472, 0.4, 0.475),
        (0.6, 0.2739, 0.6, 0.3375),
        (0.4, 0.1826, 0.8, 0.1583),
        (0.2, 0.1118, 1, -0.0312),
    ],
}
ROWS, ACTION_DIM = 6, 2


def _sampler(**keys):
    keys = {"horizon": 3, "n_action_steps": 2, "log_prob": "joint_sum", "learn_noise": False} | keys
    return FlowSampler(PolicyConfig(**keys), ACTION_DIM)


def _velocity(x, steps):
    """A nonlinear field that mixes the whole chunk and depends on the step."""
    if isinstance(steps, slice):
        steps = torch.arange(steps.stop)[:, None, None]
    elif isinstance(steps, torch.Tensor):
        steps = steps[:, None, None]
    return torch.sin(x.flip(-2)) + 0.5 * x + 0.1 * steps


def _noise(sampler, rows=ROWS, seed=0):
    return torch.randn(rows, sampler.noise_size, generator=torch.Generator().manual_seed(seed))


def _sampled_step_by_step(sampler, batch):
    """Return mean and std `[N, K, P, A]` in float64, written out from x0, x1, w0 and w1."""
    steps = sampler.config.num_inference_steps
    means, stds = [], []
    for step in range(steps):
        t, d, a = 1 - step / steps, 1 / steps, sampler.config.noise_level
        x = batch["chains"][:, step].double()
        v = _velocity(x, step)
        sigma = a * math.sqrt(t / (1 - t if step else 1 / steps))
        w1, std = {
            "flow_sde": (t - d - sigma**2 * d / (2 * t), math.sqrt(d) * sigma),
            "flow_cps": ((t - d) * math.cos(math.pi * a / 2), (t - d) * math.sin(math.pi * a / 2)),
            "flow_noise": (t - d, a),
        }[sampler.config.noise_method]
        means.append((1 - (t - d)) * (x - v * t) + w1 * (x + v * (1 - t)))
        stds.append(torch.full_like(x, std))
    return torch.stack(means, 1), torch.stack(stds, 1)


@pytest.mark.parametrize("num_steps", [4, 5])
def test_flow_sde_matches_the_published_values(num_steps):
    grid = step_grid(num_steps)
    w0, w1, std = step_weights("flow_sde", grid, torch.tensor(0.5))
    expected = torch.tensor(FLOW_SDE[num_steps])
    torch.testing.assert_close(torch.stack([grid.time, std, w0, w1], 1), expected, rtol=0, atol=6e-5)


def test_flow_cps_keeps_the_noise_of_the_interpolant_and_ends_deterministic():
    """w1^2 + std^2 = (t - d)^2: the coefficients are preserved."""
    grid = step_grid(4)
    _, w1, std = step_weights("flow_cps", grid, torch.tensor(0.5))
    torch.testing.assert_close(w1**2 + std**2, grid.next_time**2)
    torch.testing.assert_close(std, torch.tensor([0.75, 0.5, 0.25, 0]) * 2**-0.5)
    assert std[-1] == 0


def test_flow_noise_is_an_euler_step_with_a_fixed_std():
    grid = step_grid(4)
    gains = transition("flow_noise", grid, torch.tensor(0.2))
    euler = transition("ode", grid, torch.tensor(0.2))
    assert torch.equal(gains.x_gain, euler.x_gain)
    assert torch.equal(gains.v_gain, euler.v_gain)
    torch.testing.assert_close(gains.std, torch.full((4,), 0.2))


@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_ode_equals_euler(num_steps):
    x_gain, v_gain, std = transition("ode", step_grid(num_steps), torch.tensor(0.5))
    torch.testing.assert_close(x_gain, torch.ones(num_steps))
    torch.testing.assert_close(v_gain, torch.full((num_steps,), -1 / num_steps))
    assert not std.any()


def test_denoising_integrates_a_constant_velocity_exactly():
    sampler = _sampler(num_inference_steps=5)
    noise = _noise(sampler)
    denoised = sampler.denoise(lambda x, _: torch.full_like(x, 2.0), noise)
    torch.testing.assert_close(denoised.flatten(1), noise[:, :6] - 2.0)


@pytest.mark.parametrize("method", ["flow_sde", "flow_cps", "flow_noise"])
def test_sampling_and_log_probs_match_torch_distributions(method):
    sampler = _sampler(noise_method=method, log_prob="per_step")
    noise = _noise(sampler)
    batch = sampler.sample(_velocity, noise)
    mean, std = _sampled_step_by_step(sampler, batch)
    step_noise = noise[:, 6:30].view(ROWS, 4, 3, ACTION_DIM)
    torch.testing.assert_close(batch["chains"][:, 1:].double(), mean + std * step_noise, rtol=1e-5, atol=1e-5)
    kept, executed = sampler.num_stochastic, 2
    normal = Normal(mean[:, :kept, :executed], std[:, :kept, :executed])
    expected = normal.log_prob(batch["chains"][:, 1 : kept + 1, :executed].double()).sum((2, 3))
    for log_probs in (batch["log_probs"], sampler.evaluate(_velocity, batch).log_probs):
        torch.testing.assert_close(log_probs.double(), expected, rtol=1e-5, atol=2e-5)
    entropy = sampler.evaluate(_velocity, batch).entropy
    torch.testing.assert_close(entropy.double(), normal.entropy().mean(1).sum((1, 2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["flow_sde", "flow_cps", "flow_noise"])
def test_modes_reduce_the_same_terms(method):
    per_step, total, mean = (
        _sampler(noise_method=method, log_prob=mode) for mode in ("per_step", "joint_sum", "joint_mean")
    )
    results = [sampler.sample(_velocity, _noise(sampler))["log_probs"] for sampler in (per_step, total, mean)]
    torch.testing.assert_close(results[0].sum(1), results[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[2] * mean.log_prob_terms, results[1], rtol=1e-5, atol=1e-5)
    assert mean.log_prob_terms == mean.num_stochastic * 2 * ACTION_DIM


def test_only_the_executed_actions_enter_the_log_prob():
    """A field without mixing: what happens to the last action of the chunk cannot matter."""
    sampler = _sampler(noise_method="flow_sde")
    batch = sampler.sample(lambda x, _: 0.3 * x, _noise(sampler))
    batch["chains"][:, :, 2:] += 1.0
    assert torch.equal(sampler.evaluate(lambda x, _: 0.3 * x, batch).log_probs, batch["log_probs"])
    batch["chains"][:, 1, 1] += 1.0
    assert not torch.equal(sampler.evaluate(lambda x, _: 0.3 * x, batch).log_probs, batch["log_probs"])


def test_flow_cps_leaves_its_last_step_out():
    sampler = _sampler(noise_method="flow_cps")
    batch = sampler.sample(_velocity, _noise(sampler))
    before = sampler.evaluate(_velocity, batch).log_probs
    batch["chains"][:, -1] += 1.0
    assert torch.equal(sampler.evaluate(_velocity, batch).log_probs, before)
    single = _sampler(noise_method="flow_cps", log_prob="single_step")
    inds = single.sample(_velocity, _noise(single, rows=500))["denoise_inds"]
    assert inds.unique().tolist() == [0, 1, 2]


def test_single_step_is_stochastic_at_its_index_alone():
    sampler = _sampler(noise_method="flow_sde", log_prob="single_step")
    batch = sampler.sample(_velocity, _noise(sampler, rows=40))
    chains, rows = batch["chains"], torch.arange(40)
    euler = torch.stack([chains[:, k] - _velocity(chains[:, k], k) / 4 for k in range(4)], 1)
    is_stochastic = ((chains[:, 1:] - euler).abs() > 1e-5).any(-1).any(-1)
    assert torch.equal(is_stochastic, torch.nn.functional.one_hot(batch["denoise_inds"], 4).bool())
    mean, std = (part[rows, batch["denoise_inds"], :2] for part in _sampled_step_by_step(sampler, batch))
    expected = Normal(mean, std).log_prob(chains[rows, batch["denoise_inds"] + 1, :2].double()).sum((1, 2))
    torch.testing.assert_close(batch["log_probs"].double(), expected, rtol=1e-5, atol=2e-5)


def test_denoise_index_is_uniform_and_a_function_of_its_own_number():
    normal = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    inds = uniform_index(normal, 5)
    counts = inds.bincount(minlength=5)
    chi_square = ((counts - 8_000) ** 2 / 8_000).sum()
    assert chi_square < 18.5  # 0.1 % of uniform draws exceed this, 4 degrees of freedom
    assert torch.equal(uniform_index(normal[7:8], 5), inds[7:8])
    assert uniform_index(torch.tensor([-40.0, 40.0]), 5).tolist() == [0, 4]


def test_changing_the_noise_of_one_row_changes_no_other_index():
    sampler = _sampler(log_prob="single_step")
    noise = _noise(sampler)
    other = noise.clone()
    other[0] = -other[0]
    first, second = (sampler.sample(_velocity, values) for values in (noise, other))
    assert first["denoise_inds"][0] != second["denoise_inds"][0]
    assert torch.equal(first["denoise_inds"][1:], second["denoise_inds"][1:])
    assert torch.equal(first["chains"][1:], second["chains"][1:])


def test_floor_raises_small_stds_and_keeps_deterministic_steps():
    std = torch.tensor([0.0, 0.05, 0.3])
    assert torch.equal(floor_std(std, 0.1), torch.tensor([0.0, 0.1, 0.3]))


@pytest.mark.parametrize("method", ["flow_sde", "flow_cps", "flow_noise"])
def test_min_std_holds_in_sampling_and_in_log_probs(method):
    sampler = _sampler(noise_method=method, min_std=0.4, noise_level=0.1, log_prob="per_step")
    noise = _noise(sampler)
    batch = sampler.sample(_velocity, noise)
    kept, step_noise = sampler.num_stochastic, noise[:, 6:30].view(ROWS, 4, 3, ACTION_DIM)
    mean, _ = _sampled_step_by_step(sampler, batch)
    kick = (batch["chains"][:, 1:] - mean).float()
    torch.testing.assert_close(kick[:, :kept], 0.4 * step_noise[:, :kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kick[:, kept:], torch.zeros_like(kick[:, kept:]), rtol=0, atol=1e-5)
    expected = Normal(0.0, 0.4).log_prob(kick[:, :kept, :2]).sum((2, 3))
    torch.testing.assert_close(sampler.evaluate(_velocity, batch).log_probs, expected, rtol=1e-4, atol=1e-4)


def test_learned_std_starts_at_the_geometric_mean_and_stays_in_its_range():
    sampler = _sampler(noise_method="flow_noise", learn_noise=True)
    start = sampler.learned_std(sampler.noise_logit)
    torch.testing.assert_close(start, torch.full((ACTION_DIM,), math.sqrt(0.08 * 0.16)))
    ends = sampler.learned_std(torch.tensor([-50.0, 50.0]))
    torch.testing.assert_close(ends, torch.tensor([0.08, 0.16]))


@pytest.mark.parametrize("floor", [0.05, 0.12])
def test_learned_noise_above_a_floor_is_learned(floor):
    sampler = _sampler(noise_method="flow_noise", learn_noise=True, min_std=floor)
    lowest = max(0.08, floor)
    torch.testing.assert_close(sampler.learned_std(torch.tensor([-50.0, 50.0])), torch.tensor([lowest, 0.16]))
    sampler.evaluate(_velocity, sampler.sample(_velocity, _noise(sampler))).entropy.sum().backward()
    assert (sampler.noise_logit.grad > 0).all()


def test_learned_std_is_evaluated_under_todays_weights():
    sampler = _sampler(noise_method="flow_noise", learn_noise=True)
    batch = sampler.sample(_velocity, _noise(sampler))
    with torch.no_grad():
        sampler.noise_logit.fill_(1.0)
    std = sampler.learned_std(sampler.noise_logit)[0].item()
    evaluated = sampler.evaluate(_velocity, batch)
    expected = Normal(0.0, std).entropy() * 2 * ACTION_DIM
    torch.testing.assert_close(evaluated.entropy, expected.expand(ROWS))
    assert (evaluated.log_probs - batch["log_probs"]).abs().min() > 1e-3


def test_annealing_is_linear_in_updates_and_published_with_the_weights():
    sampler = _sampler(noise_method="flow_sde", noise_level=0.6, noise_level_final=0.2, anneal_updates=4)
    levels = []
    for update in (0, 1, 2, 4, 9):
        sampler.anneal(update)
        levels.append(sampler.state_dict()["noise_level"].item())
    assert levels == pytest.approx([0.6, 0.5, 0.4, 0.2, 0.2])


@pytest.mark.parametrize("mode", ["joint_sum", "joint_mean", "per_step", "single_step"])
@pytest.mark.parametrize("method", ["flow_sde", "flow_cps", "flow_noise"])
def test_annealing_after_sampling_leaves_stored_decisions_exact(method, mode):
    keys = {"noise_level": 0.6, "noise_level_final": 0.2, "anneal_updates": 4}
    sampler = _sampler(noise_method=method, log_prob=mode, **keys)
    batch = sampler.sample(_velocity, _noise(sampler))
    before = sampler.evaluate(_velocity, batch).log_probs
    sampler.anneal(4)
    assert torch.equal(sampler.evaluate(_velocity, batch).log_probs, before)
    assert not torch.equal(sampler.sample(_velocity, _noise(sampler))["log_probs"], batch["log_probs"])


def test_rows_sampled_at_different_levels_are_evaluated_in_one_batch():
    sampler = _sampler(noise_method="flow_sde", noise_level=0.6, noise_level_final=0.2, anneal_updates=1)
    early = sampler.sample(_velocity, _noise(sampler))
    sampler.anneal(1)
    late = sampler.sample(_velocity, _noise(sampler, seed=1))
    both = {key: torch.cat([early[key], late[key]]) for key in early}
    torch.testing.assert_close(sampler.evaluate(_velocity, both).log_probs, both["log_probs"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"noise_method": "flow_cps", "num_inference_steps": 1}, "num_inference_steps = 1 .* use >= 2"),
        ({"noise_method": "flow_cps", "noise_level": 1.5}, "noise_level = 1.5.* flow_cps allows at most 1"),
        ({"noise_level_final": 0.2}, "noise_level_final = 0.2 with policy.anneal_updates = 0; set both"),
        ({"anneal_updates": 3}, "noise_level_final = None with policy.anneal_updates = 3; set both"),
        (
            {"learn_noise": True, "noise_level_final": 0.2, "anneal_updates": 3},
            "noise_level_final = 0.2 needs policy.learn_noise = false",
        ),
        ({"learn_noise": True, "min_std": 0.2}, "min_std = 0.2 must be below policy.noise_range"),
    ],
)
def test_impossible_combinations_name_key_value_and_remedy(keys, message):
    with pytest.raises(ConfigError, match=message):
        _sampler(**keys)


@pytest.mark.parametrize("method", ["flow_sde", "flow_cps", "flow_noise"])
@pytest.mark.parametrize("mode", ["joint_sum", "joint_mean", "per_step", "single_step"])
def test_padding_follows_the_ode_and_has_no_log_prob(method, mode):
    """Where padding does not touch the actions, log-probs and entropy are those of a model without it."""

    def velocity(x, steps):
        return torch.cat([_velocity(x[..., :ACTION_DIM], steps), x[..., ACTION_DIM:]], -1)

    keys = {"horizon": 3, "n_action_steps": 2, "noise_method": method, "log_prob": mode}
    plain, padded = (FlowSampler(PolicyConfig(**keys), ACTION_DIM, width) for width in (None, ACTION_DIM + 3))
    noise = _noise(padded)
    chunks = noise[:, : 5 * 3 * (ACTION_DIM + 3)].view(ROWS, 5, 3, ACTION_DIM + 3)
    same = torch.cat([chunks[..., :ACTION_DIM].flatten(1), noise[:, chunks[0].numel() :]], 1)
    wide, narrow = padded.sample(velocity, noise), plain.sample(_velocity, same)
    assert padded.log_prob_terms == plain.log_prob_terms
    torch.testing.assert_close(wide["chains"][..., :ACTION_DIM], narrow["chains"])
    torch.testing.assert_close(wide["log_probs"], narrow["log_probs"])
    evaluated, expected = (s.evaluate(v, x) for s, v, x in ((padded, velocity, wide), (plain, _velocity, narrow)))
    torch.testing.assert_close(evaluated.entropy, expected.entropy)
    torch.testing.assert_close(evaluated.log_probs, wide["log_probs"])
    torch.testing.assert_close(wide["chains"][:, -1, :, ACTION_DIM:], padded.denoise(velocity, noise)[..., ACTION_DIM:])
