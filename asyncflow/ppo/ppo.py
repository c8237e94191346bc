"""PPO on one rollout: what an update trains on, its epochs and minibatches, and what it reports.

Updates are atomic: if anything raises during one, weights and optimizer state are restored. PPO does not know which
thread collected the rollout.

Shapes: T decisions, N environments, B decisions of a minibatch (`num_minibatches` divides T * N), K denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from asyncflow.config.sections import AlgorithmConfig
from asyncflow.errors import ConfigError, TrainingError
from asyncflow.policies.base import Policy
from asyncflow.ppo.advantages import AdvantageEstimator, check_estimate, make_estimator
from asyncflow.ppo.auxiliary import AuxiliaryLoss, build_auxiliary, check_names
from asyncflow.ppo.average import WeightAverage
from asyncflow.ppo.denoising import treat_steps_differently
from asyncflow.ppo.gae import Transitions
from asyncflow.ppo.losses import (
    add_gains,
    behavior_weights,
    can_be_squared,
    masked_mean,
    normalize_by_task,
    sum_steps,
    surrogate_loss,
    value_loss,
)
from asyncflow.ppo.optimizer import GuardedAdam
from asyncflow.ppo.report import COLUMNS, LOGGED, Step, summarise, tabulate
from asyncflow.ppo.reward_scale import RewardScale
from asyncflow.ppo.schedules import learning_rate_factor
from asyncflow.ppo.settings import PPOSettings, apply_settings
from asyncflow.rollout.ring import Rollout
from asyncflow.seeding import derive_seed, permutation

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PPO:
    """Trains one policy on one rollout after another. Used by the main thread only.

    Attributes:
        config: The settings.
        seed: Of the minibatches' order; None, which counts as 0, until a trainer sets it.
        total_updates: Length of the run, over which a step size may fall; None until a trainer sets it.
        is_described: Whether `config` alone builds it again.
        auxiliary: More terms of the loss.
        optimizer: Adam, with a step size each for actor and critic.
        num_nonfinite_steps: Minibatches of the run that were skipped because a number was not finite.
    """

    def __init__(  # noqa: PLR0913  what a user may say in place of a configuration
        self,
        policy: Policy,
        config: AlgorithmConfig | None = None,
        *,
        seed: int | None = None,
        total_updates: int | None = None,
        auxiliary: Sequence[AuxiliaryLoss] = (),
        advantage: AdvantageEstimator | str | None = None,
        **settings: Unpack[PPOSettings],
    ) -> None:
        """Create the optimizer, and allocate what undoes an update.

        Args:
            policy: What is trained.
            config: The settings; None for the defaults.
            seed: Of the minibatches' order; None: the trainer's, or 0 without one.
            total_updates: Length of the run, over which a step size may fall; None: the trainer's.
            auxiliary: More terms of the loss, in place of those that `config` lists.
            advantage: An estimator, or a name as for `algorithm.advantage`; None: that of `config`.
            settings: Fields of `AlgorithmConfig` that replace those of `config`, such as `clip_coef=0.02`.

        Raises:
            ConfigError: `policy` is none, a setting is unknown or not allowed, or an estimator cannot be imported.
        """
        if not isinstance(policy, Policy):
            raise ConfigError(f"PPO's first argument is a {type(policy).__name__}; expected a Policy: PPO(policy, ...)")
        if isinstance(advantage, str):
            settings = {**settings, "advantage": advantage}  # type: ignore[typeddict-unknown-key]
        self.policy = policy
        self.config = config = apply_settings(config, settings)
        self.seed, self.total_updates = seed, total_updates
        self.num_nonfinite_steps = 0
        self._estimator = make_estimator(config) if isinstance(advantage, str | None) else advantage
        self.auxiliary = check_names(auxiliary or [build_auxiliary(each, policy) for each in config.auxiliary])
        is_listed = [each.made_from for each in self.auxiliary] == config.auxiliary
        self.is_described = is_listed and isinstance(advantage, str | None)
        self._reward_scale = RewardScale() if config.reward_scaling else None
        self._weights = [each.weight for each in self.auxiliary]  # of the update under way
        self._average = None if config.ema_decay is None else WeightAverage(policy, config.ema_decay)
        self._actor = [p for p in policy.actor_parameters() if p.requires_grad]
        self._critic = [p for p in policy.critic_parameters() if p.requires_grad]
        groups = [
            {"params": self._actor, "lr": config.learning_rate},
            {"params": self._critic, "lr": config.critic_learning_rate},
        ]
        named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.optimizer = GuardedAdam(groups, named, eps=1e-5)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state by name, not copied; with the policy's weights, all that training goes on from.

        A parameter that was never trained, such as the actor's during the critic's warm-up, has no state. Names of
        what is not the optimizer's say whose it is: `auxiliary|bc|actions`.
        """
        own = {f"{owner}|{name}": x for owner, part in self._stateful() for name, x in part.state.items()}
        return self.optimizer.state_tensors() | own

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` of another PPO returned.

        Raises:
            CheckpointError: A tensor is unknown, missing or of another shape.
        """
        self.optimizer.load_state_tensors({name: x for name, x in tensors.items() if "|" not in name})
        device = next(self.policy.parameters()).device
        for owner, part in self._stateful():
            prefix = f"{owner}|"
            own = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
            part.load_state({name: x.to(device, copy=True) for name, x in own.items()})

    def _stateful(self) -> list[tuple[str, RewardScale | AuxiliaryLoss]]:
        """Return what has a `state` beside the optimizer's, by name."""
        found: list[tuple[str, RewardScale | AuxiliaryLoss]] = []
        if self._reward_scale is not None:
            found.append(("reward_scale", self._reward_scale))
        return found + [(f"auxiliary|{each.name}", each) for each in self.auxiliary]

    def begin_average(self) -> None:
        """Let averaged weights, if there are any, begin with those that the policy has now."""
        if self._average is not None:
            self._average.begin()

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Let the policy have, within a block, the weights that evaluations act and checkpoints decide with.

        These are the averaged ones with `algorithm.ema_decay`; else the policy is left as it is.
        """
        return nullcontext() if self._average is None else self._average.in_place()

    def update(self, rollout: Rollout, version: int, on_minibatch: Callable[[], None]) -> dict[str, float]:
        """Train on a rollout and return the `train/` metrics. Whatever is raised, nothing was changed then.

        Args:
            rollout: What to train on; only read.
            version: Updates that the policy has seen.
            on_minibatch: Called before every minibatch; may raise to abandon the update.

        Raises:
            TrainingError: More minibatches of the run were skipped than `algorithm.max_nonfinite_steps`.
        """
        with self._undone_on_error():
            rates = self.learning_rates(version)
            for group, rate in zip(self.optimizer.param_groups, rates.values(), strict=True):
                group["lr"] = rate
            self._weights = [each.weight_in(version, self.total_updates) for each in self.auxiliary]
            batch = self._prepare(rollout, version)
            table, num_epochs = self._run_epochs(batch, version, on_minibatch)
            metrics = summarise(table, batch, [each.name for each in self.auxiliary]) | {"train/num_epochs": num_epochs}
            self._count_skipped(int(metrics["train/nonfinite_skipped"]))
        if self._average is not None:
            self._average.follow()
        return metrics | rates

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        num_nonfinite_steps = self.num_nonfinite_steps
        states = [(part, part.state) for _, part in self._stateful()]  # whose tensors nobody changes in place
        buffers = {name: buffer.detach().clone() for name, buffer in self.policy.named_buffers()}
        self.optimizer.remember()
        try:
            yield
        except BaseException:  # a KeyboardInterrupt too
            self.optimizer.put_back()
            for name, buffer in buffers.items():  # a running mean, for one, moves with every forward
                self.policy.get_buffer(name).copy_(buffer)
            for part, state in states:
                part.state = state
            self.num_nonfinite_steps = num_nonfinite_steps
            raise

    def _run_epochs(self, batch: TensorDict, version: int, on_minibatch: Callable[[], None]) -> tuple[Tensor, int]:
        """Take all steps of an update; return the minibatches' table of numbers and the number of epochs."""
        is_warmup, epochs = version < self.config.critic_warmup_updates, range(self.config.update_epochs)
        orders = torch.stack([permutation(self.seed or 0, version, epoch, len(batch)) for epoch in epochs])
        steps: list[Step] = []
        seen: list[TensorDict] = []
        for order in orders.to(batch.device):
            taken, logged = self._run_epoch(self._shuffle(batch, order), is_warmup, on_minibatch)
            steps += taken
            seen.append(logged)
            if self._is_kl_exceeded(taken, logged):
                break
        return self._tabulate(steps, TensorDict.cat(seen)), len(seen)

    def _run_epoch(
        self, minibatches: TensorDict, is_warmup: bool, on_minibatch: Callable[[], None]
    ) -> tuple[list[Step], TensorDict]:
        """Take an epoch's steps. Returned are they and `LOGGED`, and no reference to the rest of this copy."""
        steps = []
        for minibatch in minibatches.unbind(0):
            on_minibatch()
            steps.append(self._step(minibatch, is_warmup))
        return steps, minibatches.select(*LOGGED, strict=False)

    def _shuffle(self, batch: TensorDict, order: Tensor) -> TensorDict:
        """Return an epoch's minibatches, [num_minibatches, B]: one copy of the rollout in another order, with gains."""
        size = [self.config.num_minibatches, len(batch) // self.config.num_minibatches]

        def pick(x: Tensor) -> Tensor:
            return x.index_select(0, order).view(*size, *x.shape[1:])

        minibatches = batch.exclude(*_OUTCOME).apply(pick, batch_size=size)
        assert minibatches is not None  # only an `apply` to nothing returns that
        add_gains(minibatches, self.config.dual_clip)
        return minibatches

    def _count_skipped(self, num_skipped: int) -> None:
        self.num_nonfinite_steps += num_skipped
        limit = self.config.max_nonfinite_steps
        if self.num_nonfinite_steps > limit:
            raise TrainingError(
                f"training diverged: steps of {self.num_nonfinite_steps} minibatches were skipped for a number "
                f"that was not finite; algorithm.max_nonfinite_steps = {limit}"
            )

    def _is_kl_exceeded(self, steps: list[Step], minibatches: TensorDict) -> bool:
        if self.config.target_kl is None:
            return False
        kl = self._tabulate(steps, minibatches)[:, COLUMNS.index("prox_kl")].nanmean()  # NaN if all were skipped
        return bool(kl > self.config.target_kl)  # sync: once per epoch, only with target_kl

    def learning_rates(self, version: int) -> dict[str, float]:
        """Return the step sizes of actor and critic in the update of a version, by their metric names."""
        config = self.config
        fraction = learning_rate_factor(
            config.lr_schedule, version, self.total_updates, num_warmup=config.lr_warmup_updates
        )
        rates = {"learning_rate": config.learning_rate, "critic_learning_rate": config.critic_learning_rate}
        return {f"train/{name}": rate * fraction for name, rate in rates.items()}

    def _prepare(self, rollout: Rollout, version: int) -> TensorDict:
        """Return the flat batch [T*N] with proximal log-probs, behavior weights, advantages and returns."""
        batch: TensorDict = rollout.data.clone()
        num_envs = batch.batch_size[1]
        piece = batch.numel() // self.config.num_minibatches
        with torch.no_grad():
            self._add_advantages(batch, rollout, piece)
            batch["obs"] = rollout.obs[:-1].clone()
            for each in self.auxiliary:
                each.begin_update(self.policy, batch, derive_seed(self.seed or 0, f"auxiliary {each.name}", version))
            batch = batch.flatten(0, 1)
            self._add_proximal(batch, rollout.policy_version != version, piece)
            if self.config.normalize_advantages:
                num_tasks = rollout.info.num_tasks if self.config.advantage_scope == "task" else 1
                batch["advantages"] = normalize_by_task(batch["advantages"], batch["valid"], num_tasks, num_envs)
            if self.config.has_denoising_schedule:
                treat_steps_differently(batch, self.config, self.policy.num_denoising_steps)
        return batch

    def _add_advantages(self, batch: TensorDict, rollout: Rollout, piece: int) -> None:
        """Add `values`, `advantages` and `returns`, [T, N], from today's value function, and `is_lost`.

        A decision with a number that is not finite, or too large to be squared and added up, becomes invalid before
        anything is accumulated or normalised, so that it spoils no other one; `is_lost` says which were valid until
        then.
        """
        given, transitions = batch["valid"], self._transitions(batch, rollout, piece)
        is_usable = can_be_squared(transitions.errors)
        transitions = transitions.without(~(given & is_usable))
        advantages, returns = check_estimate(self._estimator, self._estimator(transitions), transitions.values)
        is_usable &= can_be_squared(advantages) & can_be_squared(returns)  # small numbers may add up to a large one
        batch["valid"], batch["is_lost"] = given & is_usable, given & ~is_usable
        batch["values"] = transitions.values
        batch["advantages"], batch["returns"] = (x.masked_fill(~is_usable, 0.0) for x in (advantages, returns))

    def _transitions(self, batch: TensorDict, rollout: Rollout, piece: int) -> Transitions:
        """Return what the estimator needs, with today's values, [T, N]."""
        values = self._values(rollout.obs, piece)
        finals = self._values(rollout.final_obs, piece).gather(0, batch["final_index"])
        next_values = torch.where(batch["truncated"], finals, values[1:])
        boundary, rewards, discounts = batch["terminated"] | batch["truncated"], batch["rewards"], batch["discounts"]
        if self._reward_scale is not None:
            rewards = self._reward_scale.scale(rewards, discounts, boundary, batch["valid"] & can_be_squared(rewards))
        return Transitions(rewards, values[:-1], next_values, discounts, batch["terminated"], boundary)

    def _values(self, obs: TensorDictBase, piece: int) -> Tensor:
        """Return V of observations [R, N], computed `piece` at a time, [R, N]."""
        pieces = obs.clone().flatten(0, 1).split(piece)
        return torch.cat([self.policy.get_value(p) for p in pieces]).view(obs.batch_size)

    def _add_proximal(self, batch: TensorDict, is_stale: bool, piece: int) -> None:
        """Add `proximal` log-probs and the `weights` that correct for staleness.

        Data of the version that is being trained keeps its stored log-probs, so that it is plain PPO exactly.
        """
        batch["behavior"] = batch["log_probs"]
        batch["proximal"] = batch["log_probs"]
        batch["weights"] = torch.ones_like(batch["advantages"])
        batch["is_weight_clipped"] = torch.zeros_like(batch["valid"])
        if not (is_stale and self.config.decoupled):
            return
        pieces = [self.policy.default_forward(p)["log_probs"] for p in batch.split(piece)]
        batch["proximal"] = torch.cat(pieces)
        log_weight = sum_steps(batch["proximal"] - batch["behavior"]) * self.policy.log_prob_terms
        batch["weights"], batch["is_weight_clipped"] = behavior_weights(
            log_weight, self.config.behavior_weight, self.config.behavior_weight_max
        )

    def _step(self, batch: TensorDict, is_warmup: bool) -> Step:
        """Take one optimizer step, unless a number is not finite or no decision is valid. Reads nothing back."""
        config, valid = self.config, batch["valid"]
        out = self.policy.default_forward(batch)
        surrogate = surrogate_loss(out["log_probs"], batch, self._clip_of(batch))
        value = value_loss(out["values"], batch, config.clip_coef if config.clip_value_loss else None)
        entropy = masked_mean(out["entropy"], valid)
        auxiliary = [each(self.policy, batch, out) for each in self.auxiliary]
        loss = config.vf_coef * value
        if not is_warmup:
            loss = loss + surrogate
            if config.ent_coef:
                loss = loss - config.ent_coef * entropy
            for weight, each in zip(self._weights, auxiliary, strict=True):
                loss = loss + weight * each
        self.optimizer.drop_gradients()
        if loss.requires_grad:  # frozen parameters may leave nothing to train
            loss.backward()
        norms = self.optimizer.clip_gradients(config.max_grad_norm)
        # Whatever its weight: an entropy that is not finite is that of a broken policy.
        is_finite = (loss.detach() + norms.sum() + (0.0 if is_warmup else entropy.detach())).isfinite()
        is_usable = is_finite & valid.any()  # zero gradients would still move weights by their momentum
        self.optimizer.step_if(is_usable)
        terms = torch.stack([x.detach().float() for x in (surrogate, value, entropy, *auxiliary)])
        return Step(terms, norms, out["log_probs"].detach(), is_usable, is_finite)

    def _tabulate(self, steps: list[Step], minibatches: TensorDict) -> Tensor:
        return tabulate(steps, minibatches, self._clip_of(minibatches), self.config.dual_clip)

    def _clip_of(self, batch: TensorDict) -> float | Tensor:
        """Return the clip of the ratio: one number, or one of each log-prob."""
        return batch["clip_coef"] if self.config.has_denoising_schedule else self.config.clip_coef


# What neither a loss nor a policy reads, and no epoch shuffles.
_OUTCOME = (
    "rewards",
    "discounts",
    "executed",
    "terminated",
    "truncated",
    "succeeded",
    "final_index",
    "is_weight_clipped",
)
