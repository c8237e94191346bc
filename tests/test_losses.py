"""Losses against hand-computed numbers."""

import math

import pytest
import torch
from tensordict import TensorDict

from asyncflow.losses import behavior_weights, kl_estimate, masked_mean, normalize, policy_loss, value_loss


def loss_batch(proximal, advantages, weights=None, valid=None, behavior=None):
    size = len(advantages)
    return TensorDict(
        {
            "proximal": torch.tensor(proximal),
            "behavior": torch.tensor(behavior if behavior is not None else proximal),
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
    out = policy_loss(log_probs, batch, 0.2, None)
    assert float(out.loss) == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    assert float(out.clip_fraction) == 1.0


def test_dual_clip_bounds_what_a_negative_advantage_costs():
    batch = loss_batch([0.0, 0.0], [-1.0, -1.0])
    out = policy_loss(torch.tensor([10.0, 2.0]).log(), batch, 0.2, 3.0)
    assert float(out.loss) == pytest.approx((3.0 + 2.0) / 2)
    assert float(out.dual_clip_fraction) == 0.5


def test_invalid_decisions_are_in_neither_numerator_nor_denominator():
    batch = loss_batch([0.0, 0.0], [2.0, 100.0], valid=[True, False])
    assert float(policy_loss(torch.zeros(2), batch, 0.2, None).loss) == -2.0


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_an_invalid_decision_whose_ratio_overflows_leaves_no_trace(shape):
    log_probs = torch.zeros(shape)
    log_probs[1] = 1000.0
    log_probs.requires_grad_()
    batch = loss_batch(torch.zeros(shape).tolist(), [2.0, 0.0], valid=[True, False])
    out = policy_loss(log_probs, batch, 0.2, 3.0)
    out.loss.backward()
    assert (float(out.loss.detach()), float(out.approx_kl), float(out.prox_kl)) == (-2.0, 0.0, 0.0)
    assert float(log_probs.grad[0].sum()) == pytest.approx(-2.0)
    assert not log_probs.grad[1].any()


def test_without_a_valid_decision_loss_and_gradient_are_zero():
    log_probs, values = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    batch = loss_batch([0.0, 0.0], [1.0, 1.0], valid=[False, False])
    batch["returns"] = torch.zeros(2)
    loss = policy_loss(log_probs, batch, 0.2, None).loss + value_loss(values, batch, None)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not log_probs.grad.any()
    assert not values.grad.any()


def test_weights_multiply_and_carry_no_gradient_of_their_own():
    log_probs = torch.zeros(2, requires_grad=True)
    batch = loss_batch([0.0, 0.0], [1.0, 1.0], weights=[2.0, 0.0])
    policy_loss(log_probs, batch, 0.2, None).loss.backward()
    assert log_probs.grad.tolist() == [-1.0, 0.0]


def test_per_step_ratios_share_their_decision_s_advantage():
    batch = loss_batch([[0.0, 0.0], [0.0, 0.0]], [1.0, -2.0])
    log_probs = torch.tensor([[1.1, 1.0], [1.0, 1.0]]).log()
    assert float(policy_loss(log_probs, batch, 0.2, None).loss) == pytest.approx(-(1.1 + 1.0 - 2.0 - 2.0) / 4)


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
    assert float(value_loss(torch.tensor([0.5]), batch, None)) == 0.125
    assert float(value_loss(torch.tensor([0.5]), batch, 0.1)) == pytest.approx(0.5 * 0.81)


def test_normalisation_uses_valid_decisions_alone():
    out = normalize(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False]))
    torch.testing.assert_close(out, torch.tensor([-1.0, 1.0, 0.0]))
    assert float(masked_mean(torch.tensor([5.0]), torch.tensor([False]))) == 0.0


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


@pytest.mark.parametrize("shape", [(50,), (50, 4)])
def test_the_decoupled_loss_equals_a_float64_reference_on_stale_data(shape):
    rng = torch.Generator().manual_seed(7)
    proximal, behavior, log_probs = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(3))
    batch = TensorDict(
        {
            "proximal": proximal,
            "behavior": behavior,
            "advantages": torch.randn(50, generator=rng, dtype=torch.float64),
            "weights": torch.rand(50, generator=rng, dtype=torch.float64) * 2,
            "valid": torch.rand(50, generator=rng) < 0.8,
        },
        [50],
    )
    out = policy_loss(log_probs, batch, 0.2, 3.0)
    assert float(out.loss) == pytest.approx(reference_loss(log_probs, batch, 0.2, 3.0), rel=1e-12)
    assert float(out.approx_kl) == pytest.approx(float(masked_mean(kl_estimate(log_probs - behavior), batch["valid"])))
    assert float(out.prox_kl) == pytest.approx(float(masked_mean(kl_estimate(log_probs - proximal), batch["valid"])))
