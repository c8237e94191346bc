"""Build everyone that trains in `tools.bench.peers`: asyncflow, stable-baselines3, rsl_rl, a loop of CleanRL's shape.

Owns how each of them comes to the same network, weights, rollout and number of optimizer steps. An update begins with
a finished rollout and ends with trained weights, advantages included, whoever computes them elsewhere.

Shapes: T decisions, N environments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from rsl_rl.algorithms import PPO as RslPPO
from rsl_rl.models import MLPModel
from rsl_rl.storage import RolloutStorage
from stable_baselines3 import PPO as SB3PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from tensordict import TensorDict
from torch import Tensor, nn

from asyncflow.config.sections import AlgorithmConfig
from asyncflow.policies.gaussian import GaussianPolicy
from asyncflow.ppo.ppo import PPO
from tools.bench.core.workers import NUM_ENVS
from tools.bench.peers.cleanrl import CleanRLAgent, train_like_cleanrl
from tools.bench.peers.setting import (
    ALGORITHM,
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
    Batch,
)


@dataclass(frozen=True)
class Contender:
    """Someone who trains.

    Attributes:
        parameters: What is trained, the same numbers for all at first.
        optimizer: Whose steps are counted.
        log_probs: Returns those of the batch under the present weights, [T*N].
        refill: Puts the rollout where collecting would have left it; not timed.
        update: What is timed.
        is_validating: Whether `torch.distributions` checks its arguments, as it does unless it is told otherwise.
    """

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    log_probs: Callable[[], Tensor]
    refill: Callable[[], object]
    update: Callable[[], object]
    is_validating: bool = True


def make_asyncflow(policy: GaussianPolicy, batch: Batch, version: int) -> Contender:
    """Return asyncflow; the rollout is of version 0, so that one of version 1 is trained with lag 1."""
    ppo = PPO(policy, AlgorithmConfig(**ALGORITHM, dual_clip=None), seed=0)
    data = batch.rollout.data.clone()
    data["obs"] = batch.rollout.obs[:-1]
    return Contender(
        parameters=list(policy.parameters()),
        optimizer=ppo.optimizer,
        log_probs=lambda: policy.default_forward(data.flatten(0, 1))["log_probs"],
        refill=lambda: None,
        update=lambda: ppo.update(batch.rollout, version, lambda: None),
    )


class SpacesOnly(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """An environment of which only the spaces are asked for."""

    observation_space = Box(-np.inf, np.inf, (STATE_DIM,), np.float32)
    action_space = Box(-1.0, 1.0, (CHUNK_DIM,), np.float32)


def make_sb3(env: VecEnv, num_steps: int) -> SB3PPO:
    """Return stable-baselines3's PPO for the network and the batch of the comparison."""
    network = {"net_arch": {"pi": HIDDEN, "vf": HIDDEN}, "activation_fn": nn.ReLU, "log_std_init": float(np.log(STD))}
    rollout = {"n_steps": num_steps, "gamma": CHUNK_GAMMA, "gae_lambda": LAMBDA}
    loss = {"clip_range": CLIP, "vf_coef": VF_COEF, "ent_coef": ENT_COEF}
    size = num_steps * env.num_envs // NUM_MINIBATCHES
    steps = {"n_epochs": NUM_EPOCHS, "batch_size": size, "learning_rate": LEARNING_RATE, "max_grad_norm": MAX_GRAD_NORM}
    return SB3PPO("MlpPolicy", env, **rollout, **loss, **steps, policy_kwargs=network, device="cpu")


def make_sb3_contender(policy: GaussianPolicy, batch: Batch) -> Contender:
    """Return stable-baselines3, whose advantages are computed at the end of collecting and are timed here."""
    model = make_sb3(DummyVecEnv([SpacesOnly] * NUM_ENVS), len(batch.obs))
    model.set_logger(Logger(folder=None, output_formats=[]))
    theirs, extractor = model.policy, model.policy.mlp_extractor
    copy_linears([policy.actor], [extractor.policy_net, theirs.action_net])
    copy_linears([policy.critic], [extractor.value_net, theirs.value_net])
    starts = torch.cat([torch.ones(1, NUM_ENVS), batch.dones[:-1].float()]).numpy()

    def refill() -> None:
        model.rollout_buffer.reset()
        for t, start in enumerate(starts):
            row = (batch.obs[t], batch.actions[t], batch.rewards[t], start, batch.values[t], batch.log_probs[t])
            model.rollout_buffer.add(*row)

    def update() -> None:
        model.rollout_buffer.compute_returns_and_advantage(batch.last_values, batch.dones[-1].numpy())
        model.train()

    evaluate = lambda: theirs.evaluate_actions(batch.obs.flatten(0, 1), batch.actions.flatten(0, 1))[1]  # noqa: E731
    return Contender(list(theirs.parameters()), theirs.optimizer, evaluate, refill, update)


def make_rsl_rl(policy: GaussianPolicy, batch: Batch) -> Contender:
    """Return rsl_rl, without its adaptive step size and its clipped value loss."""
    rows = TensorDict({"policy": batch.obs}, batch.obs.shape[:2])
    groups, network = {"actor": ["policy"], "critic": ["policy"]}, {"hidden_dims": HIDDEN, "activation": "relu"}
    gaussian = {"class_name": "GaussianDistribution", "init_std": STD, "std_type": "log"}
    actor = MLPModel(rows[0], groups, "actor", CHUNK_DIM, distribution_cfg=gaussian, **network)
    critic = MLPModel(rows[0], groups, "critic", 1, **network)
    storage = RolloutStorage("rl", NUM_ENVS, len(batch.obs), rows[0], [CHUNK_DIM])
    returns, loss = {"gamma": CHUNK_GAMMA, "lam": LAMBDA}, {"value_loss_coef": VF_COEF, "entropy_coef": ENT_COEF}
    clip = {"clip_param": CLIP, "use_clipped_value_loss": False, "max_grad_norm": MAX_GRAD_NORM}
    epochs = {"num_learning_epochs": NUM_EPOCHS, "num_mini_batches": NUM_MINIBATCHES}
    rate = {"learning_rate": LEARNING_RATE, "schedule": "fixed"}
    ppo = RslPPO(actor, critic, storage, **returns, **loss, **clip, **epochs, **rate)
    copy_linears([policy.actor], [actor.mlp])
    copy_linears([policy.critic], [critic.mlp])
    fill_storage(ppo, batch)
    last_obs = TensorDict({"policy": batch.last_obs}, [NUM_ENVS])

    def log_probs() -> Tensor:
        actor(rows.flatten(0, 1), stochastic_output=True)
        found: Tensor = actor.get_output_log_prob(batch.actions.flatten(0, 1))
        return found

    def update() -> None:
        ppo.compute_returns(last_obs)
        ppo.update()

    parameters = [*actor.parameters(), *critic.parameters()]
    return Contender(
        parameters, ppo.optimizer, log_probs, lambda: None, update, is_validating=False
    )  # it says so itself


def fill_storage(ppo: RslPPO, batch: Batch) -> None:
    """Put the rollout into rsl_rl's storage, where an update leaves it; actions are ours, their spread is its own."""
    for t, obs in enumerate(batch.obs):
        ppo.act(TensorDict({"policy": obs}, [NUM_ENVS]))
        ppo.transition.actions = batch.actions[t]
        ppo.transition.actions_log_prob = batch.log_probs[t]
        ppo.process_env_step(None, batch.rewards[t], batch.dones[t], {})


def make_cleanrl(policy: GaussianPolicy, batch: Batch) -> Contender:
    """Return a loop of CleanRL's shape."""
    agent = CleanRLAgent(STATE_DIM, CHUNK_DIM, HIDDEN, STD)
    copy_linears([policy.actor], [agent.actor_mean])
    copy_linears([policy.critic], [agent.critic])
    optimizer = torch.optim.Adam(agent.parameters(), lr=LEARNING_RATE, eps=1e-5)
    flat = (batch.obs.flatten(0, 1), batch.actions.flatten(0, 1))
    return Contender(
        parameters=list(agent.parameters()),
        optimizer=optimizer,
        log_probs=lambda: agent.evaluate(*flat)[0],
        refill=lambda: None,
        update=lambda: train_like_cleanrl(agent, optimizer, batch),
    )


def copy_linears(sources: Iterable[nn.Module], targets: Iterable[nn.Module]) -> None:
    """Give the linear layers of one network the weights of another's, in order."""
    for source, target in zip(find_linears(sources), find_linears(targets), strict=True):
        target.load_state_dict(source.state_dict())


def find_linears(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """Return the linear layers of modules, in order."""
    return [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)]
