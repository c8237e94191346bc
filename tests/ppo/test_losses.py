"""Losses against hand-computed numbers."""

import math

import pytest
import torch
from tensordict import TensorDict

from asyncflow.ppo.losses import (
    add_gains,
    behavior_weights,
    kl_estimate,
    masked_mean,
    normalize,
    normalize_by_task,
    policy_statistics,
    surrogate_loss,
    value_loss,
)


def differentiate(loss, inputs, *arguments):
    """Return the loss of some inputs, a float, and its gradient with respect to them."""
    inputs = inputs.detach().requires_grad_()
    value = loss(inputs, *arguments)
    (gradient,) = torch.autograd.grad(value, inputs)
    return float(value.detach()), gradient


def surrogate(log_probs, batch, clip_coef, dual_clip):
    """Return the loss of a batch whose gains are computed from the fields that it has now."""
    batch = batch.copy()
    add_gains(batch, dual_clip)
    return surrogate_loss(log_probs, batch, clip_coef)


def loss_batch(proximal, advantages, weights=None, valid=None):
    size = len(advantages)
    return TensorDict(
        {
            "proximal": torch.tensor(proximal),
            "behavior": torch.tensor(proximal),
            "advantages": torch.tensor(advantages),
            "weights": torch.tensor(weights) if weights else torch.ones(size),
            "valid": torch.tensor(valid) if valid else torch.ones(size, dtype=torch.bool),
        },
        [size],
    )


def test_clipped_objective_by_hand():
    batch = loss_batch([0.0, 0.0, 0.0, 0.0], [1.0, 1.0, -1.0, -1.0])
    log_probs = torch.tensor([1.5, 0.5, 1.5, 0.5]).log()
    # objectives: min(1.5, 1.2), min(.5, .8), min(-1.5, -1.2), min(-.5, -.8)
    value, gradient = differentiate(surrogate, log_probs, batch, 0.2, None)
    assert value == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    assert gradient.tolist() == pytest.approx([0.0, -0.5 / 4, 1.5 / 4, 0.0])
    assert float(policy_statistics(log_probs, batch, 0.2, None).clip_fraction) == 1.0


def test_dual_clip_bounds_what_a_negative_advantage_costs():
    batch = loss_batch([0.0, 0.0], [-1.0, -1.0])
    log_probs = torch.tensor([10.0, 2.0]).log()
    value, gradient = differentiate(surrogate, log_probs, batch, 0.2, 3.0)
    assert value == pytest.approx((3.0 + 2.0) / 2)
    assert gradient.tolist() == pytest.approx([0.0, 2.0 / 2])
    assert float(policy_statistics(log_probs, batch, 0.2, 3.0).dual_clip_fraction) == 0.5


def test_without_a_dual_clip_nothing_counts_as_clipped_by_it():
    batch = loss_batch([0.0, 0.0], [-1.0, 1.0])
    assert float(policy_statistics(torch.tensor([10.0, 10.0]), batch, 0.2, None).dual_clip_fraction) == 0.0


def test_invalid_decisions_are_in_neither_numerator_nor_denominator():
    batch = loss_batch([0.0, 0.0], [2.0, 100.0], valid=[True, False])
    assert differentiate(surrogate, torch.zeros(2), batch, 0.2, None)[0] == -2.0


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_an_invalid_decision_whose_ratio_overflows_leaves_no_trace(shape):
    log_probs = torch.zeros(shape)
    log_probs[1] = 1000.0
    batch = loss_batch(torch.zeros(shape).tolist(), [2.0, 0.0], valid=[True, False])
    value, gradient = differentiate(surrogate, log_probs, batch, 0.2, 3.0)
    logged = policy_statistics(log_probs, batch, 0.2, 3.0)
    assert (value, float(logged.approx_kl), float(logged.prox_kl)) == (-2.0, 0.0, 0.0)
    assert float(gradient[0].sum()) == pytest.approx(-2.0)
    assert not gradient[1].any()


def test_without_a_valid_decision_loss_and_gradient_are_zero():
    batch = loss_batch([0.0, 0.0], [1.0, 1.0], valid=[False, False])
    batch["returns"] = torch.zeros(2)
    for loss, arguments in ((surrogate, (0.2, 3.0)), (value_loss, (None,))):
        value, gradient = differentiate(loss, torch.ones(2), batch, *arguments)
        assert value == 0.0
        assert not gradient.any()


def test_weights_multiply():
    batch = loss_batch([0.0, 0.0], [1.0, 1.0], weights=[2.0, 0.0])
    assert differentiate(surrogate, torch.zeros(2), batch, 0.2, None)[1].tolist() == [-1.0, 0.0]


def test_per_step_ratios_share_their_decision_s_advantage():
    batch = loss_batch([[0.0, 0.0], [0.0, 0.0]], [1.0, -2.0])
    log_probs = torch.tensor([[1.1, 1.0], [1.0, 1.0]]).log()
    assert float(surrogate(log_probs, batch, 0.2, None)) == pytest.approx(-(1.1 + 1.0 - 2.0 - 2.0) / 4)


def test_kl_estimate_is_zero_at_no_change_and_positive_elsewhere():
    assert float(kl_estimate(torch.tensor(0.0))) == 0.0
    assert float(kl_estimate(torch.tensor(0.5))) == pytest.approx(math.exp(0.5) - 1 - 0.5)
    assert (kl_estimate(torch.tensor([-1.0, 1.0])) > 0).all()


def test_behavior_weights_are_truncated_or_masked_and_counted():
    log_weight = torch.tensor([0.0, math.log(1.5), math.log(8.0), 50.0])
    weights, is_over = behavior_weights(log_weight, "truncate", 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.5, 2.0, 2.0]))
    assert is_over.tolist() == [False, False, True, True]
    masked, _ = behavior_weights(log_weight, "mask", 2.0)
    torch.testing.assert_close(masked, torch.tensor([1.0, 1.5, 0.0, 0.0]))


def test_value_loss_by_hand_with_and_without_clipping():
    batch = TensorDict(
        {"values": torch.tensor([0.0]), "returns": torch.tensor([1.0]), "valid": torch.tensor([True])}, [1]
    )
    assert differentiate(value_loss, torch.tensor([0.5]), batch, None) == (0.125, torch.tensor([-0.5]))
    value, gradient = differentiate(value_loss, torch.tensor([0.5]), batch, 0.1)
    assert (value, gradient.tolist()) == (pytest.approx(0.5 * 0.81), [0.0])


def test_normalisation_uses_valid_decisions_alone():
    out = normalize(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False]))
    torch.testing.assert_close(out, torch.tensor([-1.0, 1.0, 0.0]))
    assert float(masked_mean(torch.tensor([5.0]), torch.tensor([False]))) == 0.0


@pytest.mark.parametrize("advantage", [0.1, -3.7, 1e-12, 1e17, 0.0])
def test_constant_advantages_become_zero(advantage):
    out = normalize(torch.full((960,), advantage), torch.arange(960) != 3)
    assert torch.equal(out, torch.zeros(960))


def test_advantages_that_differ_beyond_rounding_are_normalised_however_little():
    out = normalize(torch.tensor([1.0, 1.00001]), torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(out, torch.tensor([-1.0, 1.0]), rtol=0.01, atol=0)


def reference_loss(log_probs, batch, clip, dual):
    """The decoupled objective, decision by decision, in Python floats (AReaL, eq. 5; dual clip, eq. 5)."""
    total, count = 0.0, 0
    for b in range(len(log_probs)):
        if not batch["valid"][b]:
            continue
        new, proximal = (x[b].reshape(-1).tolist() for x in (log_probs, batch["proximal"]))
        advantage, weight = float(batch["advantages"][b]), float(batch["weights"][b])
        for now, before in zip(new, proximal, strict=True):
            ratio = math.exp(now - before)
            objective = min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
            if advantage < 0:
                objective = max(objective, dual * advantage)
            total, count = total - weight * objective, count + 1
    return total / count


def random_batch(shape):
    rng = torch.Generator().manual_seed(7)
    proximal, behavior, log_probs = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(3))
    fields = {name: torch.randn(50, generator=rng, dtype=torch.float64) for name in ("advantages", "returns", "values")}
    fields |= {"proximal": proximal, "behavior": behavior, "valid": torch.rand(50, generator=rng) < 0.8}
    fields["weights"] = torch.rand(50, generator=rng, dtype=torch.float64) * 2
    return log_probs, TensorDict(fields, [50])


@pytest.mark.parametrize("shape", [(50,), (50, 4)])
def test_the_decoupled_loss_equals_a_float64_reference_on_stale_data(shape):
    log_probs, batch = random_batch(shape)
    behavior, proximal, valid = batch["behavior"], batch["proximal"], batch["valid"]
    logged = policy_statistics(log_probs, batch, 0.2, 3.0)
    loss = surrogate(log_probs, batch, 0.2, 3.0)
    assert float(loss) == pytest.approx(reference_loss(log_probs, batch, 0.2, 3.0), rel=1e-12)
    assert float(logged.approx_kl) == pytest.approx(float(masked_mean(kl_estimate(log_probs - behavior), valid)))
    assert float(logged.prox_kl) == pytest.approx(float(masked_mean(kl_estimate(log_probs - proximal), valid)))


@pytest.mark.parametrize("dual", [1e9, 3.0])
@pytest.mark.parametrize("shape", [(50,), (50, 4)])
def test_the_surrogates_gradient_is_the_slope_of_the_float64_reference(shape, dual):
    """Compared with central differences of the decision-by-decision loss in Python floats."""
    log_probs, batch = random_batch(shape)
    _, gradient = differentiate(surrogate, log_probs, batch, 0.2, dual)
    flat, step = log_probs.view(-1), 1e-6
    for index in range(0, len(flat), 7):
        sides = []
        for sign in (1, -1):
            moved = flat.clone()
            moved[index] += sign * step
            sides.append(reference_loss(moved.view(shape), batch, 0.2, dual))
        assert float(gradient.view(-1)[index]) == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=1e-8)
    assert (gradient[batch["valid"]] == 0).any()  # of a ratio that is clipped


@pytest.mark.parametrize("clip", [None, 0.3])
def test_the_value_losss_gradient_is_the_slope_of_the_float64_reference(clip):
    _, batch = random_batch((50,))
    values = torch.randn(50, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    loss, gradient = differentiate(value_loss, values, batch, clip)
    total, slopes = 0.0, []
    for value, before, wanted, valid in zip(
        *(x.tolist() for x in (values, batch["values"], batch["returns"], batch["valid"])), strict=True
    ):
        change = value - before
        limited = value if clip is None else before + min(max(change, -clip), clip)
        is_limited = abs(limited - wanted) > abs(value - wanted)
        total += 0.5 * ((limited if is_limited else value) - wanted) ** 2 * valid
        slopes.append(0.0 if is_limited else (value - wanted) * valid)
    assert loss == pytest.approx(total / int(batch["valid"].sum()), rel=1e-12)
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64) / batch["valid"].sum())
    assert clip is None or (gradient[batch["valid"]] == 0).any()


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("name", ["returns", "values", "advantages", "weights"])
def test_an_invalid_decision_that_is_not_finite_leaves_no_trace(name, clip):
    log_probs, batch = random_batch((50,))
    today = batch["values"] + 0.1

    def losses():
        return [differentiate(surrogate, log_probs, batch, 0.2, 3.0), differentiate(value_loss, today, batch, clip)]

    clean = losses()
    batch[name][~batch["valid"]] = torch.inf
    for (value, gradient), (poisoned, its_gradient) in zip(clean, losses(), strict=True):
        assert value == poisoned
        assert torch.equal(gradient, its_gradient)


def test_statistics_of_several_minibatches_are_those_of_each():
    log_probs, batch = random_batch((50, 4))
    logged = policy_statistics(log_probs.view(5, 10, 4), batch.view(5, 10), 0.2, 3.0)
    for index, part in enumerate(batch.split(10)):
        alone = policy_statistics(log_probs[10 * index :][:10], part, 0.2, 3.0)
        assert [float(x[index]) for x in logged] == pytest.approx([float(x) for x in alone])


def test_advantages_of_each_task_are_normalised_by_themselves():
    given = torch.tensor([[1.0, 10.0, 2.0], [3.0, 30.0, 6.0]])  # [T, N]; environments 0 and 2 have the first task
    valid = torch.tensor([[True, True, True], [True, True, False]])
    out = normalize_by_task(given.flatten(), valid.flatten(), num_tasks=2, num_envs=3).view(2, 3)
    assert out[:, 1].tolist() == pytest.approx([-1.0, 1.0])
    first = torch.tensor([1.0, 2.0, 3.0])
    expected = (first - first.mean()) / first.std(unbiased=False)
    assert [out[0, 0], out[0, 2], out[1, 0]] == pytest.approx(expected.tolist(), abs=1e-6)
    assert out[1, 2] == 0.0
    alone = normalize_by_task(given.flatten(), valid.flatten(), num_tasks=1, num_envs=3)
    assert torch.equal(alone, normalize(given.flatten(), valid.flatten()))


@pytest.mark.parametrize("shape", [(50,), (50, 4)])
def test_gains_of_several_minibatches_are_those_of_each(shape):
    _, batch = random_batch(shape)
    together = batch.view(5, 10)
    add_gains(together, 3.0)
    for index, part in enumerate(batch.split(10)):
        add_gains(part, 3.0)
        assert torch.equal(together["gain"][index], part["gain"])
        assert torch.equal(together["floor"][index], part["floor"])
