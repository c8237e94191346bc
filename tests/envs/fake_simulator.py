"""A simulator of four numbers for tests; its actions decide what happens to it."""

import os
import threading

import numpy as np

from asyncflow.envs.base import EnvSpec

SUCCEED, RAISE, HANG, DIE, NAN_REWARD, NAN_OBS = range(6)  # action dimensions; above 0.5 they take effect
ACTION_DIM = 6
HORIZON = 10


class FakeSimulator:
    """State: what its seed draws, its constructor seed's draw, steps in the episode, sum of the actions so far."""

    def __init__(self, seed: int) -> None:
        self.spec = EnvSpec(obs_shapes={"state": (4,)}, action_dim=ACTION_DIM, horizon=HORIZON)
        self.state = np.zeros(4)
        self.state[1] = np.random.default_rng(seed).uniform()

    def reset(self, seed: int) -> None:
        self.state[[0, 2, 3]] = np.random.default_rng(seed).uniform(), 0, 0

    def step(self, action):
        flags = action > 0.5
        if flags[RAISE]:
            raise ArithmeticError("the fake was told to raise")
        if flags[HANG]:
            threading.Event().wait()
        if flags[DIE]:
            os._exit(3)
        self.state[2] += 1
        self.state[3] = np.nan if flags[NAN_OBS] else 0.5 * self.state[3] + action.sum()
        return np.nan if flags[NAN_REWARD] else 0.25, bool(flags[SUCCEED])  # positive without success: shaped

    def observe(self):
        return self.state.astype(np.float32)
