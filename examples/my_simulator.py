"""A simulator of your own, under an interpreter of its own, which needs numpy alone.

python examples/my_simulator.py                  # 20 updates, simulated by this interpreter
python examples/my_simulator.py ~/other/bin/python
PYTHONPATH=examples asyncflow train env.task=my_simulator:Reach env.python=~/other/bin/python
"""

import sys

import numpy as np

import asyncflow as af


class Reach(af.Simulator):
    """A point in the plane reaches for a goal."""

    spec = af.EnvSpec({"state": (4,)}, action_dim=2, horizon=40)

    def __init__(self, seed):
        """Draw what stays for good: how far one action moves the point."""
        self.stride = np.random.default_rng(seed).uniform(0.1, 0.2)

    def reset(self, seed):
        """Start the episode that belongs to the seed."""
        self.point, self.goal = np.random.default_rng(seed).uniform(-1, 1, (2, 2))

    def step(self, action):
        """Execute one action, [2] in [-1, 1]; return its reward and whether the goal is reached."""
        self.point = np.clip(self.point + self.stride * action, -1, 1)
        is_solved = bool(np.linalg.norm(self.point - self.goal) < 0.15)
        return float(is_solved), is_solved

    def observe(self):
        """Return point and goal, [4]."""
        return np.concatenate([self.point, self.goal])


def main():
    """Train a Gaussian policy, and measure it."""
    python = sys.argv[1] if len(sys.argv) > 1 else None
    num_updates = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    env = af.SimulatorVecEnv("my_simulator:Reach", python=python, num_envs=16, n_action_steps=1)
    policy = af.make_policy("gaussian", env, hidden_sizes=[64, 64], initial_std=0.5)
    ppo = af.PPO(policy, learning_rate=3e-4, clip_coef=0.2, num_minibatches=8, critic_warmup_updates=0)
    with af.Trainer(policy, env, ppo, buffer_size=2048) as trainer:
        trainer.train(total_updates=num_updates)
        print(f"simulated by {env.interpreter}: success {af.evaluate(policy, env, num_episodes=100).success_rate:.0%}")


if __name__ == "__main__":
    main()
