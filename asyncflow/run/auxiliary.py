"""PPO for a run: with the losses of `algorithm.auxiliary`, and the demonstrations that they imitate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from asyncflow.config.sections import AlgorithmConfig, Config
from asyncflow.demos.dataset import read_dataset
from asyncflow.demos.pretrain import make_examples
from asyncflow.demos.samples import Examples
from asyncflow.errors import ConfigError
from asyncflow.policies.base import Policy
from asyncflow.ppo.auxiliary import AuxiliaryLoss, build_auxiliary
from asyncflow.ppo.ppo import PPO
from asyncflow.rollout.plan import RingPlan
from asyncflow.rollout.weights import changing_tensors
from asyncflow.simulators.spec import EnvSpec


def check_auxiliary(config: Config) -> None:
    """Refuse datasets that cannot be imitated, before anything slow is built.

    Raises:
        ConfigError: A dataset does not exist, or the policy has names of its own for what it holds.
    """
    for key, dataset in _datasets(config):
        if not Path(dataset).is_file():
            raise ConfigError(f"{key} = {dataset}: no such file")
        if config.policy.mapping.parts:
            raise ConfigError(
                f"{key} = {dataset} with {next(iter(config.policy.mapping.parts))}: a dataset has the simulator's names"
            )


def build_ppo(config: Config, policy: Policy, spec: EnvSpec) -> PPO:
    """Build what updates the policy.

    Args:
        config: The run, its environment settled.
        policy: As the run begins with it.
        spec: The environments', in the simulator's names.

    Raises:
        ConfigError: As `build_losses`.
    """
    losses, trainer = build_losses(config, policy, spec), config.trainer
    return PPO(policy, config.algorithm, seed=trainer.seed, total_updates=trainer.total_updates, auxiliary=losses)


def build_losses(config: Config, policy: Policy, spec: EnvSpec) -> list[AuxiliaryLoss]:
    """Return the losses of a run.

    Args:
        config: The run, its environment settled.
        policy: As the run begins with it.
        spec: The environments'.

    Raises:
        ConfigError: A dataset cannot be read or is of other observations or actions, or the policy cannot have a term.
    """
    device = next(policy.parameters()).device
    demonstrations = {name: _read(config, name, spec, key).to(device) for key, name in _datasets(config)}
    return [
        build_auxiliary(each, policy, demonstrations.get(each.dataset or "")) for each in config.algorithm.auxiliary
    ]


def kept_bytes(config: AlgorithmConfig, policy: Policy, plan: RingPlan) -> int:
    """Return the bytes that terms of the loss and averaged weights keep on the device.

    Those are the reference's weights, decisions of successful episodes, datasets, taken as large as their files, and
    the average.
    """
    trained = sum(parameter.nbytes for parameter in policy.parameters() if parameter.requires_grad)
    num_bytes = 0 if config.ema_decay is None else 2 * trained  # and the weights that it stands in for
    for each in config.auxiliary:
        if each.kind == "reference_kl":
            num_bytes += sum(tensor.nbytes for tensor in changing_tensors(policy).values())
        elif each.dataset is not None:
            num_bytes += Path(each.dataset).stat().st_size
        else:
            row = (plan.obs.bytes() + plan.fields["actions"].nbytes) // plan.num_envs
            num_bytes += 2 * each.capacity * row  # the old decisions are copied beside the new ones
    return int(num_bytes)


def _datasets(config: Config) -> Sequence[tuple[str, str]]:
    pairs = enumerate(config.algorithm.auxiliary)
    return [(f"algorithm.auxiliary[{i}].dataset", each.dataset) for i, each in pairs if each.dataset is not None]


def _read(config: Config, dataset: str, spec: EnvSpec, key: str) -> Examples:
    """Read a dataset's examples; refuse those of other observations or actions than the run's."""
    demonstrations = read_dataset(dataset, config.env)
    examples = make_examples(demonstrations, config.env.n_obs_steps, config.policy.horizon)
    obs, actions = examples.pick(torch.zeros(1, dtype=torch.int64))
    found = {name: tuple(obs[field.path(name)].shape[1:]) for name, field in examples.fields.items()}
    wanted = {name: field.shape for name, field in spec.obs.items()}
    found, wanted = found | {"actions": tuple(actions.shape[-1:])}, wanted | {"actions": (spec.action_dim,)}
    if found != wanted:
        shown = [{name: list(shape) for name, shape in shapes.items()} for shapes in (found, wanted)]
        raise ConfigError(f"{key} = {dataset}: has {shown[0]}, the run's environments {shown[1]}")
    return examples
