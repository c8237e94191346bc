"""Losses against hand-computed numbers."""

import math

import pytest
import torch
from tensordict import TensorDict

from asyncflow.ppo.losses import (
    behavior_weights,
    kl_estimate,
    masked_mean,
    normalize,
    objective_terms,
    policy_loss,
    policy_statistics,
    value_loss,
)


def with_terms(batch, clip=0.2, dual=None):
    return batch.update(objective_terms(batch, clip, dual))


def loss_batch(proximal, advantages, weights=None, valid=None, dual=None):
    size = len(advantages)
    batch = TensorDict(
        {
            "proximal": torch.tensor(proximal),
            "behavior": torch.tensor(proximal),
            "advantages": torch.tensor(advantages),
            "weights": torch.tensor(weights) if weights else torch.ones(size),
            "valid": torch.tensor(valid) if valid else torch.ones(size, dtype=torch.bool),
        },
        [size],
    )
    return with_terms(batch, dual=dual)


def test_clipped_objective_by_hand():
    batch = loss_batch([0.0, 0.0, 0.0, 0.0], [1.0, 1.0, -1.0, -1.0])
    log_probs = torch.tensor([1.5, 0.5, 1.5, 0.5]).log()
    # objectives: min(1.5, 1.2), min(.5, .8), min(-1.5, -1.2), min(-.5, -.8)
    loss = policy_loss(log_probs, batch)
    assert float(loss.value) == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    assert loss.gradient.tolist() == pytest.approx([0.0, -0.5 / 4, 1.5 / 4, 0.0])
    assert float(policy_statistics(log_probs, batch, 0.2).clip_fraction) == 1.0


def test_dual_clip_bounds_what_a_negative_advantage_costs():
    batch = loss_batch([0.0, 0.0], [-1.0, -1.0], dual=3.0)
    log_probs = torch.tensor([10.0, 2.0]).log()
    assert float(policy_loss(log_probs, batch).value) == pytest.approx((3.0 + 2.0) / 2)
    assert float(policy_statistics(log_probs, batch, 0.2).dual_clip_fraction) == 0.5


def test_without_a_dual_clip_nothing_counts_as_clipped_by_it():
    batch = loss_batch([0.0, 0.0], [-1.0, 1.0])
    assert float(policy_statistics(torch.tensor([10.0, 10.0]), batch, 0.2).dual_clip_fraction) == 0.0


def test_invalid_decisions_are_in_neither_numerator_nor_denominator():
    batch = loss_batch([0.0, 0.0], [2.0, 100.0], valid=[True, False])
    assert float(policy_loss(torch.zeros(2), batch).value) == -2.0


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_an_invalid_decision_whose_ratio_overflows_leaves_no_trace(shape):
    log_probs = torch.zeros(shape)
    log_probs[1] = 1000.0
    batch = loss_batch(torch.zeros(shape).tolist(), [2.0, 0.0], valid=[True, False], dual=3.0)
    loss, logged = policy_loss(log_probs, batch), policy_statistics(log_probs, batch, 0.2)
    assert (float(loss.value), float(logged.approx_kl), float(logged.prox_kl)) == (-2.0, 0.0, 0.0)
    assert float(loss.gradient[0].sum()) == pytest.approx(-2.0)
    assert not loss.gradient[1].any()


def test_without_a_valid_decision_loss_and_gradient_are_zero():
    batch = loss_batch([0.0, 0.0], [1.0, 1.0], valid=[False, False])
    batch["returns"] = torch.zeros(2)
    for loss in (policy_loss(torch.ones(2), batch), value_loss(torch.ones(2), batch, None)):
        assert float(loss.value) == 0.0
        assert not loss.gradient.any()


def test_weights_multiply():
    batch = loss_batch([0.0, 0.0], [1.0, 1.0], weights=[2.0, 0.0])
    assert policy_loss(torch.zeros(2), batch).gradient.tolist() == [-1.0, 0.0]


def test_per_step_ratios_share_their_decision_s_advantage():
    batch = loss_batch([[0.0, 0.0], [0.0, 0.0]], [1.0, -2.0])
    log_probs = torch.tensor([[1.1, 1.0], [1.0, 1.0]]).log()
    assert float(policy_loss(log_probs, batch).value) == pytest.approx(-(1.1 + 1.0 - 2.0 - 2.0) / 4)


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
    ).update({"share": torch.tensor([1.0])})
    assert float(value_loss(torch.tensor([0.5]), batch, None).value) == 0.125
    assert float(value_loss(torch.tensor([0.5]), batch, 0.1).value) == pytest.approx(0.5 * 0.81)


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
    loss, logged = policy_loss(log_probs, with_terms(batch, 0.2, 3.0)), policy_statistics(log_probs, batch, 0.2)
    assert float(loss.value) == pytest.approx(reference_loss(log_probs, batch, 0.2, 3.0), rel=1e-12)
    assert float(logged.approx_kl) == pytest.approx(float(masked_mean(kl_estimate(log_probs - behavior), valid)))
    assert float(logged.prox_kl) == pytest.approx(float(masked_mean(kl_estimate(log_probs - proximal), valid)))


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("shape", [(50,), (50, 4)])
def test_the_policy_loss_s_gradient_is_that_of_the_objective_as_published(shape, dual):
    log_probs, batch = random_batch(shape)
    log_probs.requires_grad_()
    advantages, weights, valid = (
        batch[name].view(50, *[1] * (len(shape) - 1)) for name in ("advantages", "weights", "valid")
    )
    ratio = (log_probs - batch["proximal"]).exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    if dual is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual * advantages), objective)
    published = -(weights * objective)[valid.expand(shape)].mean()
    published.backward()
    loss = policy_loss(log_probs.detach(), with_terms(batch, 0.2, dual))
    torch.testing.assert_close(loss.value, published.detach(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(loss.gradient, log_probs.grad, rtol=1e-12, atol=1e-15)
    assert (loss.gradient[batch["valid"]] == 0).any()  # of a ratio that is clipped


@pytest.mark.parametrize("clip", [None, 0.3])
def test_the_value_loss_s_gradient_is_that_of_the_loss_as_published(clip):
    _, batch = random_batch((50,))
    values = torch.randn(50, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    near = torch.arange(50) % 2 == 0  # not a sum: within the interval `v0 + (v - v0)` is rounded
    values = torch.where(near, batch["values"] * 0.9, values).requires_grad_()
    error = (values - batch["returns"]).square()
    if clip is not None:
        clipped = batch["values"] + (values - batch["values"]).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - batch["returns"]).square())
    published = 0.5 * error[batch["valid"]].mean()
    published.backward()
    loss = value_loss(values.detach(), with_terms(batch), clip)
    torch.testing.assert_close(loss.value, published.detach(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(loss.gradient, values.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("name", ["returns", "values", "advantages", "weights"])
def test_an_invalid_decision_that_is_not_finite_leaves_no_trace(name, clip):
    log_probs, batch = random_batch((50,))
    today = batch["values"] + 0.1
    clean = [policy_loss(log_probs, with_terms(batch.clone())), value_loss(today, with_terms(batch.clone()), clip)]
    batch[name][~batch["valid"]] = torch.inf
    poisoned = [policy_loss(log_probs, with_terms(batch)), value_loss(today, batch, clip)]
    assert all(torch.equal(a, b) for x, y in zip(clean, poisoned, strict=True) for a, b in zip(x, y, strict=True))


def test_statistics_of_several_minibatches_are_those_of_each():
    log_probs, batch = random_batch((50, 4))
    parts = batch.split(10)
    together = torch.stack([with_terms(part.clone(), 0.2, 3.0) for part in parts])
    logged = policy_statistics(log_probs.view(5, 10, 4), together, 0.2)
    for index, part in enumerate(parts):
        alone = policy_statistics(log_probs[10 * index :][:10], with_terms(part, 0.2, 3.0), 0.2)
        assert [float(x[index]) for x in logged] == pytest.approx([float(x) for x in alone])
