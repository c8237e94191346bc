"""Plays an episode of Lift whole, or cut and rebuilt by its journal."""

import torch
from torch import Tensor

from asyncflow.config.sections import EnvConfig
from asyncflow.envs import make_vec_env

CHUNK = 3


def show_last(config: EnvConfig, kind: str, camera: str, cut: int | None = None) -> Tensor:
    """Return what a camera shows after three chunks; before chunk `cut` the simulator is replaced by a rebuilt one."""
    actions = torch.rand(3, 1, CHUNK, 7, generator=torch.Generator().manual_seed(0)) - 0.5
    vec_env = make_vec_env(config, CHUNK, 1, seed=9)
    obs = vec_env.reset(5)
    for index, chunk in enumerate(actions):
        if index == cut:
            journal = vec_env.journal()
            vec_env.close()
            vec_env = make_vec_env(config, CHUNK, 1, seed=9)
            assert torch.equal(vec_env.reset(5, journal)[kind, camera], obs[kind, camera])
        vec_env.step_async(chunk, range(1))
        obs = vec_env.step_wait(range(1)).obs
    vec_env.close()
    return obs[kind, camera]
