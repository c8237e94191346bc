"""What every policy promises of its decisions, whatever cameras show it."""

import torch
from tensordict import TensorDict

from asyncflow.seeding import policy_noise


def decide(policy, obs) -> TensorDict:
    """Return decisions on observations [N], which are kept beside them."""
    noise = policy_noise(0, range(len(obs)), 0, policy.noise_size)
    return policy.sample_actions(obs, "train", noise).set("obs", obs)


def assert_ratio_is_one_in_every_minibatch_shape(policy, obs):
    """Evaluate six decisions whole and in parts; nothing was trained, so nothing may differ.

    In another batch shape a product rounds differently, each processor in its way: a float32 mean is off by some 1e-7,
    which its std, a tenth, makes some 1e-6 in each term of a log-prob.
    """
    batch = decide(policy, obs)
    steps = batch["chains"].shape[1] - 1 if "chains" in batch.keys() else 1  # noqa: SIM118  TensorDict
    num_terms = steps * batch["actions"][0, : policy.n_action_steps].numel()
    for sizes, tolerance in (([len(obs)], 1e-5), ([1, 2, 3], 1e-6 * num_terms)):
        parts = [policy.default_forward(part) for part in batch.split(sizes)]
        ratio = (torch.cat([part["log_probs"] for part in parts]) - batch["log_probs"]).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=tolerance)
        values = torch.cat([part["values"] for part in parts])
        torch.testing.assert_close(values, batch["values"], rtol=0, atol=1e-5)


def assert_every_camera_moves_decision_and_value(policy, obs, kind, invert):
    """Show the policy the opposite of what one camera saw; every decision and value has to notice."""
    before = decide(policy, obs)
    for camera in obs[kind].keys():  # noqa: SIM118  a TensorDict iterates rows
        other = obs.clone()
        other[kind, camera] = invert(other[kind, camera])
        after = decide(policy, other)
        assert ((after["actions"] - before["actions"]).abs().flatten(1).amax(1) > 0).all()
        assert ((after["values"] - before["values"]).abs() > 0).all()


def assert_the_value_teaches_the_critic_alone_and_the_decision(policy, obs, encoder):
    """Differentiate the value, then the log-prob, which has to reach every weight of the encoder."""
    out = policy.default_forward(decide(policy, obs))
    out["values"].sum().backward(retain_graph=True)
    assert {p for p in policy.parameters() if p.grad is not None} == set(policy.critic_parameters())
    out["log_probs"].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in encoder.parameters() if p.dim() > 1)
