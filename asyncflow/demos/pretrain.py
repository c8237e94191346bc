"""Behaviour cloning: a policy with a velocity field from a robomimic dataset, by flow matching.

This is the supervised loop. The critic and the learned noise stay as they were initialised.

Shapes: B chunks in a batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asyncflow.config.lerobot_folder import KIND as LEROBOT
from asyncflow.config.observations import VECTOR, read_sizes
from asyncflow.config.presets import default_horizon
from asyncflow.config.sections import Config, PolicyConfig
from asyncflow.config.tasks import name_of_env
from asyncflow.demos.dataset import Demonstrations, read_dataset
from asyncflow.demos.samples import Examples, cut_chunks, cut_histories
from asyncflow.errors import ConfigError
from asyncflow.files import check_output
from asyncflow.policies import Policy, make_policy
from asyncflow.policies.base import is_scaled, scale_actions
from asyncflow.policies.networks.encoders import find_encoders
from asyncflow.policies.networks.layers import Normalizer
from asyncflow.policies.policy_file import check_saving, save_policy
from asyncflow.policies.velocity import VelocityPolicy
from asyncflow.policies.vla.foreign import VELOCITY_METHODS
from asyncflow.ppo.promises import check_promises
from asyncflow.seeding import derive_seed
from asyncflow.simulators.spec import EnvSpec

DIVERGED = 10.0  # times the loss of untrained weights


@dataclass(frozen=True)
class PretrainOptions:
    """Settings of pre-training on demonstrations.

    Attributes:
        num_steps: Optimiser steps.
        batch_size: Chunks in a batch, B, drawn with replacement.
        learning_rate: Adam step size.
        seed: Seed of the initial weights, the batches, the noise, the times and the shifts.
        max_shift: Pixels by which images are shifted at most, in either direction.
        overwrite: Replace an existing file.
        filter_key: Which demonstrations; see `choose_demonstrations`.
        only_successes: Leave out those that never solve their task.
    """

    num_steps: int = 1000
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 0
    max_shift: int = 4
    overwrite: bool = False
    filter_key: str | None = None
    only_successes: bool = False

    def __post_init__(self) -> None:
        if self.max_shift < 0:
            raise ConfigError(f"--max-shift {self.max_shift}: must not be negative")
        for name in ("num_steps", "batch_size", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(self, name)}: must be positive and finite")


@dataclass(frozen=True)
class PretrainResult:
    """Result of pre-training.

    Attributes:
        path: The policy file.
        num_demos: Demonstrations used.
        choice: In words, which of the dataset's they are.
        num_failures: How many of them never solve their task; None where the dataset does not tell.
        num_chunks: Chunks cut from them, one a step.
        notice: What the user should know of the actions; empty if nothing.
        env_keys: The values of `env` with which a run sees what the policy was made for, by dotted key.
        first_loss: Mean flow matching loss of the first tenth of the steps.
        final_loss: Mean loss of the last tenth.
        wall_s: Seconds it took.
    """

    path: Path
    num_demos: int
    choice: str
    num_failures: int | None
    num_chunks: int
    notice: str
    env_keys: dict[str, Any]
    first_loss: float
    final_loss: float
    wall_s: float

    def describe(self) -> list[str]:
        """Return lines for a user."""
        demos = "1 demonstration" if self.num_demos == 1 else f"{self.num_demos} demonstrations"
        made = f"{self.path}: {self.num_chunks} chunks of {demos} ({self.choice}), "
        lines = [made + f"loss {self.first_loss:.4f} -> {self.final_loss:.4f}, {self.wall_s:.1f} s"]
        if self.num_failures:
            lines.append(f"of these demonstrations {self.num_failures} never succeed: --only-successes leaves them out")
        if self.notice:
            lines.append(self.notice)
        return lines


def pretrain(
    dataset: str | Path,
    out: str | Path,
    config: Config,
    options: PretrainOptions,
    on_progress: Callable[[int], None] = lambda _: None,
) -> PretrainResult:
    """Train a policy with a velocity field on a robomimic dataset and write it as a policy file.

    Args:
        dataset: HDF5 file in robomimic's layout.
        out: The policy file to write.
        config: `policy` says what to build, but for its `checkpoint`. `env` supplies `obs_keys` and `horizon`, both
            the task's own by default, `cameras`, `point_clouds` and `n_obs_steps`; the task itself, the size of images
            and how clouds are made are the dataset's.
        options: Length, batch and seed.
        on_progress: Called with the number of finished steps.

    Raises:
        ConfigError: The dataset cannot be used, `out` cannot be written, or the policy has no velocity field, names
            of its own, or a LeRobot folder; training diverged, and `out` is left as it was.
    """
    start = time.perf_counter()
    policy_config, env_config = config.policy, config.env
    inputs = [dataset, env_config.env_meta_file, policy_config.checkpoint, policy_config.vla.model_path]
    check_output(Path(out), options.overwrite, inputs)
    if policy_config.kind == LEROBOT:
        raise ConfigError(
            f"policy.kind = {LEROBOT}: LeRobot itself trains its policies on demonstrations; see lerobot-train"
        )
    if policy_config.mapping.parts:
        raise ConfigError(f"{next(iter(policy_config.mapping.parts))}: pre-training is in the simulator's own names")
    demos = read_dataset(dataset, env_config, options.filter_key, options.only_successes, default_horizon)
    examples = make_examples(demos, env_config.n_obs_steps, policy_config.horizon)
    spec = demos.spec.with_history(env_config.n_obs_steps)
    built = make_policy(policy_config, spec, options.seed)
    policy = _require_velocity(built, policy_config)
    check_saving(policy, policy_config, spec)
    if policy_config.is_from_elsewhere:
        check_promises(policy, policy_config.n_action_steps, spec, has_velocity_alone=True)
    fit_normalizers(policy, demos)
    losses = train_flow(policy, examples, options, on_progress)
    tenth = max(1, len(losses) // 10)
    first_loss, final_loss = losses[:tenth].mean().item(), losses[-tenth:].mean().item()
    _require_convergence(policy, losses[0].item(), final_loss, options)
    save_policy(out, policy, policy_config.model_copy(update={"checkpoint": None}), spec)
    return PretrainResult(
        path=Path(out),
        num_demos=len(demos.actions),
        choice=demos.choice,
        num_failures=demos.num_failures,
        num_chunks=len(examples),
        notice=demos.notice,
        env_keys=_list_env_keys(spec),
        first_loss=first_loss,
        final_loss=final_loss,
        wall_s=time.perf_counter() - start,
    )


def _list_env_keys(spec: EnvSpec) -> dict[str, Any]:
    keys = spec.rendered_with | read_sizes(spec.obs)
    return {"env.task": name_of_env(spec.env_meta)} | {f"env.{key}": value for key, value in keys.items()}


def _require_velocity(policy: Policy, config: PolicyConfig) -> VelocityPolicy:
    """Return the policy, or refuse one that flow matching cannot train.

    Raises:
        ConfigError: It has no velocity field.
    """
    if isinstance(policy, VelocityPolicy):
        return policy
    raise ConfigError(
        f"{config.source}: has no velocity field, which pre-training needs; `flow` and `vla` have one, and a model "
        f"from elsewhere with the methods {', '.join(VELOCITY_METHODS)}"
    )


def _require_convergence(policy: Policy, untrained_loss: float, final_loss: float, options: PretrainOptions) -> None:
    """Refuse weights that nothing can be done with; what learns never ends far above the loss of random weights.

    Raises:
        ConfigError: A weight is not finite, or the loss rose instead of falling.
    """
    if not math.isfinite(untrained_loss):
        raise ConfigError("--dataset: its numbers are too large: the loss before the first step is not finite")
    is_finite = all(bool(tensor.isfinite().all()) for tensor in policy.state_dict().values())
    if not is_finite or not final_loss < DIVERGED * untrained_loss:
        raise ConfigError(
            f"--learning-rate {options.learning_rate:g}: pre-training diverged, loss {untrained_loss:.3g} -> "
            f"{final_loss:.3g}; nothing was written; use a smaller one"
        )


def make_examples(demos: Demonstrations, n_obs_steps: int, horizon: int) -> Examples:
    """Return an example for every step of every demonstration."""
    return Examples(
        fields=demos.spec.obs,
        obs={key: torch.cat(demos.obs[key]) for key in demos.spec.obs},
        frames=cut_histories([len(actions) for actions in demos.actions], n_obs_steps),
        chunks=cut_chunks(demos.actions, horizon),
    )


def fit_normalizers(policy: VelocityPolicy, demos: Demonstrations) -> None:
    """Map the demonstrations' range of every dimension to [-1, 1].

    A model without asyncflow's `obs_normalizer` scales its inputs itself, and its actions are in the simulator's
    units; it is left as it is.

    Raises:
        ConfigError: A range is not finite in float32.
    """
    if not is_scaled(policy):
        return
    normalizers = {VECTOR: policy.obs_normalizer} | {
        kind: getattr(encoder, "normalizer", None) for kind, encoder in find_encoders(policy)
    }
    for kind, normalizer in normalizers.items():
        if isinstance(normalizer, Normalizer):
            own = [demos.obs[key] for key, field in demos.spec.obs.items() if field.kind == kind]
            values = torch.cat([part.flatten(0, -2) for part in chain(*own)])
            low, high = values.amin(0), values.amax(0)
            if not bool((high - low).isfinite().all()):
                raise ConfigError(
                    f"--dataset: observations ({kind}) from {low.min():.3g} to {high.max():.3g}: "
                    "that range is beyond float32"
                )
            normalizer.set_range(low, high)
    scale_actions(policy, demos.spec.action_limits, torch.cat(demos.actions))


def train_flow(
    policy: VelocityPolicy, examples: Examples, options: PretrainOptions, on_progress: Callable[[int], None]
) -> Tensor:
    """Minimise the flow matching loss with Adam and return it for every step, [num_steps].

    Args:
        policy: Trained in place, on the CPU; only what its velocity depends on, and is not frozen, has a gradient.
        examples: What to train on.
        options: Length, batch and seed.
        on_progress: Called with the number of finished steps.
    """
    shifts = torch.Generator().manual_seed(derive_seed(options.seed, "random_shift"))
    generator = torch.Generator().manual_seed(derive_seed(options.seed, "pretrain"))
    optimizer = torch.optim.Adam(policy.actor_parameters(), lr=options.learning_rate)
    losses = torch.empty(options.num_steps)
    for step in range(options.num_steps):
        rows = torch.randint(len(examples), (options.batch_size,), generator=generator)
        noise = torch.randn((options.batch_size, *policy.sampler.chunk_shape), generator=generator)
        times = torch.rand(options.batch_size, generator=generator)
        obs = examples.observe(rows, shifts, options.max_shift)
        loss = policy.flow_matching_loss(obs, examples.chunks[rows], noise, times)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
        on_progress(step + 1)
        if not bool(losses[step].isfinite()):
            losses[step:] = losses[step]
            break  # nothing finite will follow
    return losses
