"""Environments of your own: one for gymnasium, and the same one as a simulator for asyncflow.

    python examples/my_env.py           # both, 20 updates each, a minute on two cores
    python examples/my_env.py 2         # 2 updates each

Train on gymnasium's own by name: `asyncflow train env.task=gym:Pendulum-v1`.
"""

from __future__ import annotations

import sys
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

import asyncflow as af

Array = NDArray[np.float32]


class Cart:
    """A cart on a line. A force in [-1, 1] moves it; at rest within 0.1 of the origin it is parked."""

    def reset(self, seed: int) -> Array:
        """Start anywhere, at rest; the same place for the same seed."""
        self.place, self.speed = np.random.default_rng(seed).uniform(-1, 1), 0.0
        return self.observe()

    def push(self, force: float) -> bool:
        """Push once; return whether the cart is parked."""
        self.speed = 0.9 * self.speed + 0.1 * force
        self.place += self.speed
        return abs(self.place) < 0.1 and abs(self.speed) < 0.05

    def observe(self) -> Array:
        """Return place and speed."""
        return np.array([self.place, self.speed], np.float32)


class CartEnv(gymnasium.Env[Array, Array]):
    """The cart as gymnasium has environments: it ends by `terminated`, and `info` tells that this is a success."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self) -> None:
        self.cart = Cart()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed)
        return self.cart.reset(int(self.np_random.integers(2**32))), {}

    def step(self, action: Array) -> tuple[Array, SupportsFloat, bool, bool, dict[str, Any]]:
        """Push once."""
        is_parked = self.cart.push(float(action[0]))
        return self.cart.observe(), float(is_parked) - 0.01, is_parked, False, {"is_success": is_parked}


class CartSimulator(af.Simulator):
    """The cart as asyncflow has simulators: what is solved is over. asyncflow cuts episodes at `spec.horizon`."""

    spec = af.EnvSpec({"state": (2,)}, action_dim=1, horizon=60)

    def __init__(self, seed: int) -> None:
        self.cart = Cart()  # `seed` is for what an environment keeps for good, such as the size of an object

    def reset(self, seed: int) -> None:
        """Start the episode that belongs to `seed`."""
        self.cart.reset(seed)

    def step(self, action: NDArray[Any]) -> tuple[float, bool]:
        """Push once; return the reward and whether the task is solved."""
        is_parked = self.cart.push(float(action[0]))
        return float(is_parked) - 0.01, is_parked

    def observe(self) -> Array:
        """Return the `state`."""
        return self.cart.observe()


def train(env: af.VecEnv, num_updates: int) -> af.EvalResult:
    """Train a Gaussian policy from scratch and evaluate it."""
    policy = af.make_policy("gaussian", env, hidden_sizes=[64, 64], log_prob="joint_sum")
    ppo = af.PPO(policy, clip_coef=0.2, learning_rate=1e-3, critic_warmup_updates=0)
    with af.Trainer(policy, env, ppo, buffer_size=512, buffer_type="vla") as trainer:
        trainer.train(total_updates=num_updates)
        return af.evaluate(policy, env, num_episodes=50)


def main(num_updates: int = 20) -> None:
    """Train in both."""
    torch.set_num_threads(1)  # the simulators need the other cores
    for env in (
        af.GymVecEnv(CartEnv, num_envs=8, n_action_steps=2, horizon=60),
        af.SimulatorVecEnv(CartSimulator, num_envs=8, n_action_steps=2),
    ):
        result = train(env, num_updates)
        print(f"{type(env).__name__}: success {result.success_rate:.2f}, {result.episode_length:.1f} env steps")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
