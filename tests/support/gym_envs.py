"""Environments of gymnasium for tests; worker processes import this file."""

import os

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

END, CUT, SUCCEED, DIE = range(4)  # action dimensions; above 0.5 they take effect


class Clock(gymnasium.Env):
    """Observes its steps and what its seed drew; ends, is cut and succeeds as its actions say."""

    observation_space = Dict({"time": Box(0, 100, (1,)), "draw": Dict({"b": Box(0, 1, (2, 1)), "a": Box(0, 1, ())})})
    action_space = Box(-1.0, np.array([1.0, 1.0, 2.0, 1.0], np.float32), (4,), np.float32)

    def __init__(self, info_key=None):
        self.info_key = info_key

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.draw, self.time = self.np_random.uniform(size=3), 0
        return self._obs(), {}

    def step(self, action):
        flags = action > 0.5
        if flags[DIE]:
            os._exit(3)
        self.time += 1
        info = {} if self.info_key is None else {self.info_key: flags[SUCCEED]}
        return self._obs(), 0.5 * self.time, bool(flags[END]), bool(flags[CUT]), info

    def _obs(self):
        draw = {"b": self.draw[:2, None], "a": self.draw[2]}
        return {"time": np.array([self.time], np.float32), "draw": draw}


class Buttons(Clock):
    """One with discrete actions."""

    action_space = Discrete(3)


class Pictures(Clock):
    """One that shows pictures."""

    observation_space = Box(0, 255, (8, 8, 3), np.uint8)


class Words(Clock):
    """One whose observation holds something else than vectors."""

    observation_space = Dict({"time": Box(0, 100, (1,)), "word": Discrete(5)})


class OldFashioned(Clock):
    """One that answers as gym did before gymnasium."""

    def step(self, action):
        obs, reward, terminated, _, info = super().step(action)
        return obs, reward, terminated, info
