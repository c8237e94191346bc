"""Stand-ins for the libraries that `tools.bench.peers` compares with: they keep what they are given and do nothing.

The libraries are installed in an environment of their own, so that what each of them is told can be tested without it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from asyncflow.policies.networks.layers import mlp

Obs, Act = TypeVar("Obs"), TypeVar("Act")
TOOLS = [f"tools.bench.peers.{name}" for name in ("env", "contenders", "torchrl", "update", "end_to_end")]


class Given:
    """Keeps its arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


class Env(Generic[Obs, Act]):
    """gymnasium's."""


class Callback:
    """stable-baselines3's, whose `locals` are those of the loop that calls it."""


class Vec(Given):
    """stable-baselines3's vector environments."""

    @property
    def num_envs(self) -> int:
        return len(self.args[0])


class Sb3PPO(Given):
    """stable-baselines3's: the layers that it is asked for, and a buffer that keeps every row."""

    def __init__(self, kind: str, env: Any, **kwargs: Any) -> None:
        super().__init__(kind, env, **kwargs)
        self.rows: list[Any] = []
        self.rollout_buffer = SimpleNamespace(reset=self.rows.clear, add=lambda *row: self.rows.append(row))
        space, network = env.args[0][0], kwargs["policy_kwargs"]["net_arch"]
        (num_inputs,), (num_actions,) = space.observation_space.args[2], space.action_space.args[2]
        actor, critic = mlp([num_inputs, *network["pi"], num_actions]), mlp([num_inputs, *network["vf"], 1])
        extractor = SimpleNamespace(policy_net=actor[:-1], value_net=critic[:-1])
        everything = nn.ModuleList([actor, critic])
        self.policy = SimpleNamespace(
            mlp_extractor=extractor,
            action_net=actor[-1],
            value_net=critic[-1],
            parameters=everything.parameters,
            optimizer=None,
        )

    def set_logger(self, _: Any) -> None:
        """Nothing is logged."""


class Network(nn.Module):
    """rsl_rl's: the layers that it is asked for."""

    def __init__(self, obs: Any, groups: Any, group: str, num_outputs: int, **kwargs: Any) -> None:
        super().__init__()
        self.group, self.kwargs = group, kwargs
        self.mlp = mlp([obs["policy"].shape[-1], *kwargs["hidden_dims"], num_outputs])


class RslPPO(Given):
    """rsl_rl's: keeps every transition."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer, self.transition, self.kept = None, SimpleNamespace(), []

    def act(self, obs: Any) -> None:
        self.obs = obs["policy"]

    def process_env_step(self, _: Any, rewards: torch.Tensor, dones: torch.Tensor, __: Any) -> None:
        self.kept.append((self.obs, self.transition.actions, self.transition.actions_log_prob, rewards, dones))


class Loss(nn.Module):
    """TorchRL's: keeps the minibatches that it is called with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.args, self.kwargs, self.minibatches = args, kwargs, []
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, minibatch: Any) -> dict[str, torch.Tensor]:
        self.minibatches.append(minibatch)
        return dict.fromkeys(("loss_objective", "loss_critic", "loss_entropy"), self.weight)


class Advantages(Given):
    """TorchRL's: counts its calls."""

    num_calls = 0

    def __call__(self, batch: Any) -> None:
        self.num_calls += 1


NAMES: dict[str, dict[str, Any]] = {
    "gymnasium": {"Env": Env},
    "gymnasium.spaces": {"Box": Given},
    "rsl_rl": {},
    "rsl_rl.algorithms": {"PPO": RslPPO},
    "rsl_rl.models": {"MLPModel": Network},
    "rsl_rl.storage": {"RolloutStorage": Given},
    "stable_baselines3": {"PPO": Sb3PPO},
    "stable_baselines3.common": {},
    "stable_baselines3.common.callbacks": {"BaseCallback": Callback},
    "stable_baselines3.common.logger": {"Logger": Given},
    "stable_baselines3.common.vec_env": {"DummyVecEnv": Vec, "SubprocVecEnv": Vec, "VecEnv": Vec},
    "torchrl": {},
    "torchrl.collectors": {"MultiAsyncCollector": Given},
    "torchrl.envs": {"EnvBase": Given, "SerialEnv": Given},
    "torchrl.envs.gym_like": {"default_info_dict_reader": Given},
    "torchrl.envs.libs": {},
    "torchrl.envs.libs.gym": {"GymWrapper": Given},
    "torchrl.modules": {"IndependentNormal": Given, "ProbabilisticActor": Given, "ValueOperator": Given},
    "torchrl.objectives": {"ClipPPOLoss": Loss},
    "torchrl.objectives.value": {"GAE": Advantages},
}


@contextmanager
def stand_in() -> Iterator[None]:
    """Let the stand-ins be imported for as long as the context lasts; what was imported with them is forgotten."""
    before = {name: sys.modules.get(name) for name in (*NAMES, *TOOLS)}
    for name in TOOLS:
        sys.modules.pop(name, None)
    for name, contents in NAMES.items():
        module = ModuleType(name)
        vars(module).update(contents)
        sys.modules[name] = module
    vars(sys.modules["gymnasium"])["spaces"] = sys.modules["gymnasium.spaces"]
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
