"""TorchRL's PPO on Lift: its multi-process asynchronous collector, its GAE and its loss; a part of `tools.bench.peers`.

Every worker process steps its environments in turn and acts for all of them at once, with a policy of its own that is
given new weights after every update. It hands over rollouts of its environments alone, as large as everyone's.
"""

from __future__ import annotations

import math
import time
from functools import partial

import torch
from tensordict import TensorDictBase
from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
from torch import nn
from torchrl.collectors import MultiAsyncCollector
from torchrl.envs import EnvBase, SerialEnv
from torchrl.envs.gym_like import default_info_dict_reader
from torchrl.envs.libs.gym import GymWrapper
from torchrl.modules import IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from asyncflow.policies.networks.layers import mlp
from tools.bench.core.workers import split_envs
from tools.bench.peers.env import ChunkEnv, EnvPlan
from tools.bench.peers.setting import (
    CHUNK_DIM,
    CHUNK_GAMMA,
    CLIP,
    ENT_COEF,
    HIDDEN,
    LAMBDA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    NUM_EPOCHS,
    NUM_MINIBATCHES,
    STATE_DIM,
    STD,
    VF_COEF,
)


def run_torchrl(plan: EnvPlan, num_workers: int, rollout_size: int, num_updates: int) -> list[tuple[float, int]]:
    """Train; return when each update ended, in seconds, and the env steps trained on until then."""
    learner = TorchRLPPO(rollout_size)
    collector = MultiAsyncCollector(
        [partial(make_block, plan, block) for block in split_envs(num_workers)],
        learner.actor,
        frames_per_batch=rollout_size,
        total_frames=-1,
        device="cpu",
    )
    marks, env_steps = [], 0
    for batch in collector:
        learner.update(batch)
        collector.update_policy_weights_()
        env_steps += int(batch["next", "executed"].sum())
        marks.append((time.perf_counter(), env_steps))
        if len(marks) == num_updates:
            break
    collector.shutdown(timeout=2.0)
    return marks


def make_block(plan: EnvPlan, env_ids: range) -> EnvBase:
    """Return the environments of one worker, stepped in turn."""
    return SerialEnv(len(env_ids), partial(make_env, plan), create_env_kwargs=[{"index": env} for env in env_ids])


def make_env(plan: EnvPlan, index: int) -> EnvBase:
    """Return one environment, with `executed` beside its observations."""
    return GymWrapper(ChunkEnv(plan, index), device="cpu").set_info_dict_reader(default_info_dict_reader(["executed"]))


class TorchRLPPO:
    """Actor, critic, loss and optimizer, as TorchRL's own PPO scripts put them together."""

    def __init__(self, rollout_size: int) -> None:
        """Build them; the networks are asyncflow's."""
        self.actor, critic = make_actor(), make_critic()
        self._advantages = GAE(gamma=CHUNK_GAMMA, lmbda=LAMBDA, value_network=critic)
        self._loss = ClipPPOLoss(
            self.actor,
            critic,
            clip_epsilon=CLIP,
            loss_critic_type="l2",
            critic_coeff=VF_COEF,
            entropy_coeff=ENT_COEF,
            normalize_advantage=True,
        )
        self._optimizer = torch.optim.Adam(self._loss.parameters(), lr=LEARNING_RATE, eps=1e-5)
        self._minibatch_size = rollout_size // NUM_MINIBATCHES

    def update(self, batch: TensorDictBase) -> None:
        """Train on a rollout, [n, T]."""
        with torch.no_grad():
            self._advantages(batch)
        flat = batch.reshape(-1)
        for _ in range(NUM_EPOCHS):
            for indices in torch.randperm(len(flat)).split(self._minibatch_size):
                self._step(flat[indices])

    def _step(self, minibatch: TensorDictBase) -> None:
        losses = self._loss(minibatch)
        self._optimizer.zero_grad()
        (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
        nn.utils.clip_grad_norm_(self._loss.parameters(), MAX_GRAD_NORM)
        self._optimizer.step()


def make_actor() -> ProbabilisticActor:
    """Return the Gaussian actor."""
    scale = AddStateIndependentNormalScale(CHUNK_DIM, init_value=math.log(STD))
    network = nn.Sequential(mlp([STATE_DIM, *HIDDEN, CHUNK_DIM], 0.01), scale)
    module = TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"])
    return ProbabilisticActor(
        module, in_keys=["loc", "scale"], distribution_class=IndependentNormal, return_log_prob=True
    )


def make_critic() -> ValueOperator:
    """Return the value function."""
    return ValueOperator(mlp([STATE_DIM, *HIDDEN, 1], 0.01), in_keys=["observation"])
