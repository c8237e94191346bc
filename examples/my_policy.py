"""A policy class of your own, trained in a program: a Gaussian whose spread depends on what it sees.

    python examples/my_policy.py          # 30 updates on the toy, ten seconds

Shapes: N decisions, H actions of a chunk, A action size.
"""

import math
import sys
from collections.abc import Iterator

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

import asyncflow as af


class SpreadPolicy(af.Policy):
    """Four methods make a policy: `sample_actions`, `default_forward`, `get_value`, `critic_parameters`."""

    def __init__(self, spec: af.EnvSpec, n_action_steps: int, width: int = 64) -> None:
        super().__init__()
        size = spec.obs["state"].shape[0]
        self.horizon = self.n_action_steps = n_action_steps  # it predicts as many actions as are executed
        self.action_dim = spec.action_dim
        self.noise_size = n_action_steps * spec.action_dim  # normal numbers that one decision takes
        self.log_prob_terms = 1.0  # log-probs are sums, not means
        self.actor = network(size, width, 2 * self.noise_size)
        self.critic = network(size, width, 1)

    def decide(self, obs: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the flat chunk, [N, H * A] each."""
        mean, spread = self.actor(obs["state"]).chunk(2, dim=-1)
        return mean, 0.1 + 0.8 * spread.sigmoid()

    def sample_actions(self, obs: TensorDictBase, mode: str, noise: Tensor) -> TensorDict:
        """Decide; `noise` is [N, H * A], and the only randomness there is."""
        mean, std = self.decide(obs)
        flat = mean + std * noise if mode == "train" else mean
        decision = TensorDict({"actions": flat.view(-1, self.horizon, self.action_dim)}, [len(flat)])
        if mode == "train":
            decision["log_probs"] = log_prob(flat, mean, std)
            decision["values"] = self.get_value(obs)
        return decision

    def default_forward(self, batch: TensorDictBase) -> TensorDict:
        """Evaluate decisions again, under today's weights."""
        mean, std = self.decide(batch["obs"])
        log_probs = log_prob(batch["actions"].flatten(1), mean, std)
        entropy = (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(1)
        fields = {"log_probs": log_probs, "values": self.get_value(batch["obs"]), "entropy": entropy}
        return TensorDict(fields, [len(log_probs)])

    def get_value(self, obs: TensorDictBase) -> Tensor:
        """Return V, [N]."""
        value: Tensor = self.critic(obs["state"]).squeeze(-1)
        return value

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """Yield what the value alone uses; it has a step size of its own."""
        return self.critic.parameters()


def network(size: int, width: int, num_outputs: int) -> nn.Sequential:
    """Return two hidden layers, and a last one that begins near zero."""
    last = nn.Linear(width, num_outputs)
    with torch.no_grad():
        last.weight.mul_(0.01)
    return nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last)


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the log-density of normal numbers, summed over a chunk, [N]."""
    return (-0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(1)


def main(num_updates: int = 30, buffer_type: af.BufferType = "vla") -> af.Trainer:
    """Train it on the toy, and tell how often it succeeds before and after."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    env = af.make_env("Toy", num_envs=16)
    policy = SpreadPolicy(env.spec, n_action_steps=2)
    ppo = af.PPO(policy, learning_rate=1e-3, clip_coef=0.2, critic_warmup_updates=0)
    trainer = af.Trainer(policy, env, ppo, buffer_size=512, buffer_type=buffer_type, max_policy_lag=1)
    before = af.evaluate(policy, env, num_episodes=50)
    trainer.train(total_updates=num_updates)
    after = af.evaluate(policy, env, num_episodes=50)
    print(f"success {before.success_rate:.2f} before, {after.success_rate:.2f} after {num_updates} updates")
    trainer.close()
    return trainer


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
