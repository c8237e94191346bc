"""Terms that are added to PPO's loss, against hand-computed numbers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from asyncflow.config.sections import AlgorithmConfig, PolicyConfig
from asyncflow.errors import ConfigError
from asyncflow.policies import Policy, make_policy
from asyncflow.ppo.auxiliary import AuxiliaryLoss, BehaviorCloning, ReferenceKL, gaussian_kl, successful_decisions
from asyncflow.ppo.ppo import PPO
from asyncflow.rollout.ring import Rollout, RolloutInfo
from asyncflow.simulators.spec import EnvSpec

NUM_STEPS, NUM_ENVS = 4, 3


def build(kind: str = "flow", **changes: Any) -> Policy:
    sizes = {"hidden_sizes": [8], "critic_hidden_sizes": [8], "horizon": 3, "n_action_steps": 2}
    config = PolicyConfig(**({"kind": kind, "log_prob": "joint_sum", **sizes} | changes))
    return make_policy(config, EnvSpec({"state": (3,)}, 2, 10), seed=0)


def make_rollout(policy: Policy) -> Rollout:
    """Return decisions on random observations; environment 0 succeeds at decision 1, environment 2 is cut there."""
    rng = torch.Generator().manual_seed(3)
    shape = [NUM_STEPS + 1, NUM_ENVS]
    obs = TensorDict({"state": torch.randn(*shape, 3, generator=rng)}, shape)
    noise = torch.randn(NUM_STEPS * NUM_ENVS, policy.noise_size, generator=rng)
    data = policy.sample_actions(obs[:-1].flatten(0, 1), "train", noise).view(NUM_STEPS, NUM_ENVS)
    false = torch.zeros(NUM_STEPS, NUM_ENVS, dtype=torch.bool)
    flags = {name: false.clone() for name in ("terminated", "truncated", "succeeded")}
    flags["terminated"][1, 0] = flags["succeeded"][1, 0] = flags["truncated"][1, 2] = True
    rewards = torch.rand(NUM_STEPS, NUM_ENVS, generator=rng)
    data.update({**flags, "valid": ~false, "rewards": rewards, "discounts": torch.full_like(rewards, 0.9)})
    indices = torch.zeros(NUM_STEPS, NUM_ENVS, dtype=torch.int64)
    data.update({"executed": indices + 2, "final_index": indices})
    return Rollout(0, 0, RolloutInfo(0), data, obs, obs[:1])


def algorithm(**changes: Any) -> AlgorithmConfig:
    return AlgorithmConfig(**({"update_epochs": 2, "num_minibatches": 2, "critic_warmup_updates": 0} | changes))


def flat(tensors: Any) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


class Pull(AuxiliaryLoss):
    """Pulls the first actor weight up; counts how often it was asked."""

    name = "pull"

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.num_begun = self.num_asked = 0

    def begin_update(self, policy: Policy, batch: TensorDict, seed: int) -> None:
        self.num_begun += 1
        batch["number"] = torch.arange(float(batch.numel())).view(batch.batch_size)

    def __call__(self, policy: Policy, minibatch: TensorDictBase, evaluation: TensorDictBase) -> Tensor:
        self.num_asked += 1
        assert minibatch["number"].shape == minibatch["valid"].shape
        return 3.0 - next(policy.actor_parameters()).sum()


def test_a_loss_of_ones_own_is_added_with_its_weight_and_reported() -> None:
    gradients, pull = [], Pull(weight=0.5)
    for auxiliary in ([pull], []):
        policy = build()
        parameter, rollout = next(policy.actor_parameters()), make_rollout(policy)
        parameter.register_hook(lambda gradient: gradients.append(gradient.clone()))
        ppo = PPO(policy, algorithm(max_grad_norm=1e9, learning_rate=1e-12), auxiliary=auxiliary)
        metrics = ppo.update(rollout, 0, lambda: None)
        assert ("train/pull_loss" in metrics) == bool(auxiliary)
        if auxiliary:
            assert metrics["train/pull_loss"] == pytest.approx(3.0 - float(parameter.detach().sum()))
    torch.testing.assert_close(gradients[0], gradients[4] - 0.5)
    assert (pull.num_begun, pull.num_asked) == (1, 4)


def test_the_critics_warm_up_leaves_auxiliary_losses_out() -> None:
    policy = build()
    before = flat(policy.actor_parameters())
    ppo = PPO(policy, algorithm(critic_warmup_updates=1), auxiliary=[Pull(1.0)])
    ppo.update(make_rollout(policy), 0, lambda: None)
    assert torch.equal(flat(policy.actor_parameters()), before)


def test_a_loss_that_is_not_finite_takes_no_step() -> None:
    policy = build()
    before = flat(policy.parameters())
    metrics = PPO(policy, algorithm(), auxiliary=[Pull(math.inf)]).update(make_rollout(policy), 0, lambda: None)
    assert metrics["train/nonfinite_skipped"] == 4
    assert torch.equal(flat(policy.parameters()), before)


@pytest.mark.parametrize(
    ("schedule", "weights"), [("constant", [2.0] * 5), ("linear", [2.0, 1.6, 1.2, 0.8, 0.4]), ("cosine", None)]
)
def test_weights_follow_their_schedule(schedule: str, weights: list[float] | None) -> None:
    loss = BehaviorCloning(weight=2.0)
    loss.schedule, loss.weight_final = schedule, 0.4  # type: ignore[assignment]
    found = [loss.weight_in(update, 4) for update in range(5)]
    if weights is None:
        weights = [0.4 + 1.6 * 0.5 * (1 + math.cos(math.pi * update / 4)) for update in range(5)]
    assert found == pytest.approx(weights)


def test_a_falling_weight_needs_a_length() -> None:
    loss = BehaviorCloning()
    loss.schedule = "linear"
    with pytest.raises(ConfigError, match="the schedule of the auxiliary loss bc = linear needs the number of updates"):
        loss.weight_in(0, None)
    loss.schedule_updates = 2
    assert loss.weight_in(1, None) == 0.5


def test_what_is_no_auxiliary_loss_is_refused_by_what_it_is():
    with pytest.raises(ConfigError, match=r"expected losses such as ReferenceKL.*got \{'kind': 'reference_kl'\}"):
        PPO(build(), auxiliary=[{"kind": "reference_kl"}])  # type: ignore[list-item]


def test_what_cannot_be_imitated_is_refused_by_what_it_is() -> None:
    with pytest.raises(ConfigError, match=r"BehaviorCloning\(FlowPolicy\): expected demonstrations with pick"):
        BehaviorCloning(build())  # type: ignore[arg-type]


def test_two_losses_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="auxiliary losses pull, pull: expected different names"):
        PPO(build(), auxiliary=[Pull(1.0), Pull(2.0)])


# KL to the first policy.


def test_the_kl_of_gaussians_by_hand() -> None:
    kl = gaussian_kl(
        torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]), torch.tensor([2.0, 1.0])
    )
    # (1 / 4) / 2 + (1 / 4) / 2 - 1 / 2 + log 2; and 4 / 2 - 1 / 2 - log 2
    assert kl.tolist() == pytest.approx([0.125 + 0.125 - 0.5 + math.log(2), 1.5 - math.log(2)])


@pytest.mark.parametrize("kind", ["flow", "gaussian"])
def test_the_reference_kl_is_zero_before_the_first_step_and_larger_after_more(kind: str) -> None:
    policy = build(kind)
    rollout = make_rollout(policy)
    ppo = PPO(policy, algorithm(learning_rate=1e-2, update_epochs=1), auxiliary=[ReferenceKL(policy, weight=0.0)])
    first = ppo.update(rollout, 0, lambda: None)["train/reference_kl_loss"]
    later = [ppo.update(rollout, version, lambda: None)["train/reference_kl_loss"] for version in (1, 2)]
    assert 0 <= first < min(later)
    metrics = PPO(policy, algorithm(learning_rate=1e-12), auxiliary=[ReferenceKL(policy)]).update(
        rollout, 3, lambda: None
    )
    assert metrics["train/reference_kl_loss"] < 1e-6


def test_the_kl_of_a_flow_is_the_sum_over_steps_of_squared_mean_differences_by_hand() -> None:
    """Of the executed dimensions of all K steps; the means come from the velocity, decision by decision."""
    policy = build(noise_method="flow_noise", learn_noise=False, noise_level=0.3, num_inference_steps=3)
    rollout = make_rollout(policy)
    reference = ReferenceKL(policy)
    batch = rollout.data.clone()
    batch["obs"] = rollout.obs[:-1]
    first = policy.state_dict()
    first = {name: x.clone() for name, x in first.items()}
    with torch.no_grad():
        for parameter in policy.actor_parameters():
            parameter.add_(0.05)
        reference.begin_update(policy, batch, 0)
        minibatch = batch.flatten(0, 1)
        found = float(reference(policy, minibatch, policy.default_forward(minibatch)))
        means = []
        for weights in (policy.state_dict(), first):
            other = build(noise_method="flow_noise", learn_noise=False, noise_level=0.3, num_inference_steps=3)
            other.load_state_dict(weights)
            field = other.velocity_field(other.make_context(minibatch["obs"]))
            x = minibatch["chains"][:, :-1]
            means.append(torch.stack([x[:, k] - field(x[:, k], k) / 3 for k in range(3)], 1)[:, :, :2])
        wanted = ((means[0] - means[1]) ** 2 / (2 * 0.3**2)).sum((1, 2, 3)).mean()
    assert found == pytest.approx(float(wanted), rel=1e-4)
    assert found > 0.01


def test_the_kl_of_a_gaussian_counts_valid_decisions_and_executed_actions_alone() -> None:
    policy = build("gaussian")
    rollout, reference = make_rollout(policy), ReferenceKL(policy)
    rollout.data["valid"][0] = False
    batch = rollout.data.clone()
    batch["obs"] = rollout.obs[:-1]
    with torch.no_grad():
        std = policy._std().clone()
        policy.log_std.add_(0.5)
        policy.actor[-1].bias.view(3, 2)[2] += 100.0  # of an action that is not executed
        reference.begin_update(policy, batch, 0)
        batch["obs", "state"][0] = torch.nan
        minibatch = batch.flatten(0, 1)
        found = float(reference(policy, minibatch, policy.default_forward(minibatch)))
        ratio = policy._std() / std
    assert found == pytest.approx(2 * float((0.5 * (ratio**2 - 1) - ratio.log()).sum()), rel=1e-5)


def test_a_gradient_of_the_reference_kl_pulls_back() -> None:
    distances = []
    for weight in (0.0, 100.0):
        policy = build("gaussian")
        before = flat(policy.actor_parameters())
        ppo = PPO(policy, algorithm(learning_rate=1e-2), auxiliary=[ReferenceKL(policy, weight=weight)])
        for version in range(4):
            ppo.update(make_rollout(policy), version, lambda: None)
        rollout = make_rollout(policy)
        kl = ppo.update(rollout, 4, lambda: None)["train/reference_kl_loss"]
        distances.append((kl, float((flat(policy.actor_parameters()) - before).norm())))
    assert distances[1][0] < 0.5 * distances[0][0]


def test_a_policy_that_tells_no_gaussians_is_refused() -> None:
    policy = build()
    policy.has_gaussian_steps = False
    with pytest.raises(ConfigError, match="reference_kl: FlowPolicy does not tell the Gaussians of its decisions"):
        ReferenceKL(policy)


# Imitation.


class Recorded:
    """Demonstrations that keep which rows were asked for."""

    def __init__(self, num: int) -> None:
        rng = torch.Generator().manual_seed(5)
        self.states, self.actions = torch.randn(num, 3, generator=rng), torch.randn(num, 3, 2, generator=rng)
        self.rows: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.states)

    def pick(self, rows: Tensor) -> tuple[TensorDictBase, Tensor]:
        self.rows.append(rows)
        return TensorDict({"state": self.states[rows]}, [len(rows)]), self.actions[rows]


def test_a_gaussian_imitates_by_its_log_likelihood_by_hand() -> None:
    policy, recorded = build("gaussian"), Recorded(5)
    obs, actions = recorded.pick(torch.arange(5))
    with torch.no_grad():
        loss = float(policy.imitation_loss(obs, actions, torch.Generator()))
        mean, std = policy.actor(obs["state"]).view(5, 3, 2), policy._std()
    normal = torch.distributions.Normal(mean, std)
    assert loss == pytest.approx(-float(normal.log_prob(actions).mean()), rel=1e-5)


def test_a_flow_imitates_by_flow_matching() -> None:
    policy, recorded = build(), Recorded(5)
    obs, actions = recorded.pick(torch.arange(5))
    loss = policy.imitation_loss(obs, actions, torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(1)
    noise, time = torch.randn(5, 3, 2, generator=rng), torch.rand(5, generator=rng)
    assert torch.equal(loss, policy.flow_matching_loss(obs, actions, noise, time))
    x = (1 - time[:, None, None]) * actions + time[:, None, None] * noise
    velocity = policy.velocity_at(policy.make_context(obs), x, time)
    torch.testing.assert_close(loss, (velocity - (noise - actions)).square().mean())


@pytest.mark.parametrize("kind", ["flow", "gaussian"])
def test_imitating_demonstrations_lowers_their_loss(kind: str) -> None:
    policy, recorded = build(kind), Recorded(6)
    bc = BehaviorCloning(recorded, weight=10.0, batch_size=32)
    ppo = PPO(policy, algorithm(learning_rate=1e-2, update_epochs=20), auxiliary=[bc])
    rollout = make_rollout(policy)
    losses = [ppo.update(rollout, version, lambda: None)["train/bc_loss"] for version in range(4)]
    assert losses[-1] < losses[0] - 0.1
    assert {len(rows) for rows in recorded.rows} == {32}


def test_an_update_draws_the_same_examples_again_and_another_one_others() -> None:
    drawn = []
    for seed, version in ((0, 1), (0, 1), (0, 2), (1, 1)):
        policy, recorded = build(), Recorded(1000)
        ppo = PPO(policy, algorithm(), seed=seed, auxiliary=[BehaviorCloning(recorded)])
        ppo.update(make_rollout(policy), version, lambda: None)
        drawn.append(torch.stack(recorded.rows))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_successful_decisions_lead_to_a_success_within_the_rollout() -> None:
    flags = {name: torch.zeros(5, 4, dtype=torch.bool) for name in ("terminated", "truncated", "succeeded")}
    valid = torch.ones(5, 4, dtype=torch.bool)
    flags["terminated"][2, 0] = flags["succeeded"][2, 0] = True  # succeeds at 2, then an open episode
    flags["truncated"][1, 1] = flags["terminated"][3, 1] = flags["succeeded"][3, 1] = True  # is cut, then succeeds
    flags["terminated"][4, 2] = True  # fails
    flags["truncated"][4, 3] = flags["succeeded"][4, 3] = True  # cut while it was solved
    valid[1, 3] = False  # what lies before a broken decision does not count
    found = successful_decisions(TensorDict({**flags, "valid": valid}, [5, 4]))
    assert found.T.tolist() == [
        [True, True, True, False, False],
        [False, False, True, True, False],
        [False] * 5,
        [False, False, True, True, True],
    ]


def test_the_newest_successes_are_kept_and_imitated() -> None:
    policy = build("gaussian")
    bc = BehaviorCloning(capacity=3)
    ppo = PPO(policy, algorithm(), auxiliary=[bc])
    rollout = make_rollout(policy)  # two decisions of environment 0
    rollout.data["succeeded"][:] = False
    assert ppo.update(rollout, 0, lambda: None)["train/bc_loss"] == 0.0
    rollout.data["succeeded"][1, 0] = True
    assert ppo.update(rollout, 1, lambda: None)["train/bc_loss"] != 0.0
    assert torch.equal(bc.state["actions"], rollout.data["actions"][:2, 0])
    assert torch.equal(bc.state["obs:state"], rollout.obs["state"][:2, 0])
    other = make_rollout(build("gaussian", initial_std=0.3))
    ppo.update(other, 2, lambda: None)
    assert torch.equal(bc.state["actions"], torch.cat([rollout.data["actions"][1:2, 0], other.data["actions"][:2, 0]]))


def test_an_abandoned_update_keeps_no_success() -> None:
    policy = build()
    bc = BehaviorCloning()
    ppo = PPO(policy, algorithm(), auxiliary=[bc])

    def fail() -> None:
        raise RuntimeError("collector failed")

    with pytest.raises(RuntimeError, match="collector failed"):
        ppo.update(make_rollout(policy), 0, fail)
    assert bc.state == {}
    assert not any("bc" in name for name in ppo.state_tensors())


def test_state_is_taken_over_by_another_ppo() -> None:
    policy = build()
    ppo = PPO(policy, algorithm(), auxiliary=[BehaviorCloning(), ReferenceKL(policy)])
    ppo.update(make_rollout(policy), 0, lambda: None)
    later = build()
    later.load_state_dict(policy.state_dict())
    other = PPO(later, algorithm(), auxiliary=[BehaviorCloning(), ReferenceKL(later)])
    other.load_state_tensors(ppo.state_tensors())
    assert ppo.state_tensors().keys() == other.state_tensors().keys()
    assert all(torch.equal(x, other.state_tensors()[name]) for name, x in ppo.state_tensors().items())
    rollout = make_rollout(policy)
    assert ppo.update(rollout, 1, lambda: None) == other.update(rollout, 1, lambda: None)
    assert torch.equal(flat(policy.parameters()), flat(later.parameters()))


def test_configured_losses_are_built_and_a_dataset_is_the_runs_to_read() -> None:
    auxiliary = [{"kind": "reference_kl", "weight": 0.5, "schedule": "linear"}, {"kind": "bc", "weight": 0.1}]
    kl, bc = PPO(build(), AlgorithmConfig.model_validate({"auxiliary": auxiliary})).auxiliary
    assert (kl.name, kl.weight_in(1, 2), bc.name, bc.weight_in(1, 2)) == ("reference_kl", 0.25, "bc", 0.1)
    with pytest.raises(ConfigError, match=r"dataset = demos.hdf5: only a run reads datasets"):
        PPO(
            build(),
            AlgorithmConfig.model_validate({"auxiliary": [{"kind": "bc", "weight": 1, "dataset": "demos.hdf5"}]}),
        )


def test_what_the_page_shows_is_what_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "ppo.md").read_text()
    shown, code = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("yaml", "python"))
    assert shown is not None
    assert code is not None
    terms = yaml.safe_load(shown[1])["algorithm"]["auxiliary"]
    assert [each.kind for each in AlgorithmConfig(auxiliary=terms).auxiliary] == ["reference_kl", "bc"]
    policy = build()
    names: dict[str, Any] = {"policy": policy}
    exec(code[1], names)
    ppo = PPO(policy, algorithm(), auxiliary=names["ppo"].auxiliary)
    wanted = float(flat(policy.actor_parameters()).square().sum())
    assert ppo.update(make_rollout(policy), 0, lambda: None)["train/stay_small_loss"] == pytest.approx(wanted, rel=0.1)
