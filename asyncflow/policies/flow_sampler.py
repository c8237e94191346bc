"""A flow's denoising chain as a stochastic policy: its steps, its sampling, its log-probs.

This is the maths between a velocity field and a log-prob. It works for any velocity field and knows neither networks
nor observations. The steps follow pi_RL (arXiv:2510.25889: flow_sde, flow_noise), ReinFlow (arXiv:2505.22094: learned
noise) and DPPO (arXiv:2409.00588: every denoising step is a Gaussian policy, section 4). Time runs from 1 (noise) to 0
(action), and the velocity is noise - action.

Shapes: N decisions, K denoising steps, J stochastic ones (K, or K - 1 for flow_cps), P predicted actions, H executed
actions, M width of a chunk: the size of the model's action, or more in a padded model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from asyncflow.config.sections import PolicyConfig
from asyncflow.errors import ConfigError

Steps = int | slice | Tensor
Velocity = Callable[[Tensor, Steps], Tensor]
"""velocity(x, steps): `[N, P, M]` for one step (int) or one step per decision (`[N]` int64), `[N, J, P, M]` for a
slice of steps."""


class StepGrid(NamedTuple):
    """The fixed part of the K steps, each `[K]`."""

    time: Tensor
    next_time: Tensor
    variance_rate: Tensor


class Transition(NamedTuple):
    """Gaussians of the steps: `N(x_gain x + v_gain v, std)`, each broadcastable to `[N, K, P, M]`."""

    x_gain: Tensor
    v_gain: Tensor
    std: Tensor


class Evaluation(NamedTuple):
    """Evaluated chains.

    Attributes:
        log_probs: As stored, [N] or [N, J].
        entropy: [N].
        means: [N, J, H, num_executed] of the stochastic steps' Gaussians, in normalised units.
        stds: Likewise.
    """

    log_probs: Tensor
    entropy: Tensor
    means: Tensor
    stds: Tensor


def step_grid(num_steps: int) -> StepGrid:
    """Return the uniform steps from 1 to 0, with `t / (1 - t)`, whose denominator at t = 1 is `1 - t_1 = 1/K`."""
    numerators = torch.arange(num_steps, 0, -1, dtype=torch.float64)
    time, next_time = numerators / num_steps, (numerators - 1) / num_steps
    remaining = torch.cat([1 - next_time[:1], 1 - time[1:]])
    return StepGrid(time.float(), next_time.float(), (time / remaining).float())


def step_weights(method: str, grid: StepGrid, noise_level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `w0, w1, std` of `mean = w0 x0 + w1 x1`, with `x0 = x - v t` and `x1 = x + v (1 - t)`.

    pi_RL (arXiv:2510.25889), flow_sde: `sigma^2 = a^2 t / (1 - t)`, `w1 = (t - d) - sigma^2 d / (2 t)`,
    `std = sqrt(d) sigma`. Coefficients-preserving sampling (arXiv:2509.05952), flow_cps: `w1 = (t - d) cos(pi a / 2)`,
    `std = (t - d) sin(pi a / 2)`. flow_noise: the mean of an Euler step and `std = a`. ode: no noise.

    Args:
        method: A noise method, or `ode`.
        grid: The steps.
        noise_level: The noise scale a, broadcastable against `[K]`.
    """
    time, next_time, rate = grid
    delta, w0 = time - next_time, 1 - next_time
    if method == "flow_sde":
        variance = noise_level**2 * rate * delta
        return w0, next_time - variance / (2 * time), variance.sqrt()
    if method == "flow_cps":
        angle = noise_level * (math.pi / 2)
        return w0, next_time * angle.cos(), next_time * angle.sin()
    std = noise_level if method == "flow_noise" else torch.zeros_like(noise_level)
    return w0, next_time, std + torch.zeros_like(time)


def transition(method: str, grid: StepGrid, noise_level: Tensor) -> Transition:
    """Return `step_weights` collected by x and v: `mean = (w0 + w1) x + (w1 (1 - t) - w0 t) v`."""
    w0, w1, std = step_weights(method, grid, noise_level)
    return Transition(w0 + w1, w1 * (1 - grid.time) - w0 * grid.time, std)


def floor_std(std: Tensor, min_std: float) -> Tensor:
    """Raise a std to the floor; a deterministic step (std 0) stays deterministic."""
    return torch.where(std > 0, std.clamp(min=min_std), std) if min_std else std


def log_prob_terms(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the log density of `N(mean, std)` at `x`, per element, in nats."""
    distance = (x - mean) / std
    return -0.5 * (distance * distance) - (std.log() + 0.5 * math.log(2 * math.pi))  # a square's gradient costs more


def select_dims(x: Tensor, dims: Tensor | None) -> Tensor:
    """Return some of the last dimension's entries; all of them for None, or where one stands for all."""
    return x if dims is None or x.shape[-1] == 1 else x.index_select(-1, dims)


def entropy_terms(std: Tensor) -> Tensor:
    """Return the entropy of a Gaussian, per element, in nats."""
    return std.log() + 0.5 * math.log(2 * math.pi * math.e)


def uniform_index(normal: Tensor, size: int) -> Tensor:
    """Turn standard normal numbers into uniform indices below `size`, each a function of its own number."""
    uniform: Tensor = torch.special.ndtr(normal)
    return (uniform * size).long().clamp(max=size - 1)


class FlowSampler(nn.Module):
    """Denoises, and evaluates the log-prob of a stored chain (its stochastic steps, without the initial noise's prior).

    Attributes:
        noise_size: K + 1 chunks (initial noise, then every step's), and the number that picks `single_step`'s step.
        num_stochastic: J.
        log_prob_terms: See `Policy`.
        num_executed: Dimensions of a chunk that the simulator executes.
        executed_dims: Which they are, [num_executed]; None: all of them. The others, padding among them, are neither
            explored nor scored.
        noise_level: The scale a that sampling uses now, a buffer so that it is published with the weights.
    """

    time: Tensor
    next_time: Tensor
    variance_rate: Tensor
    noise_level: Tensor
    executed_dims: Tensor | None

    def __init__(self, config: PolicyConfig, action_dim: int, padded_dim: int | None = None) -> None:
        """Build the steps and, for learned noise, its parameter.

        Args:
            config: The policy's keys; its `executed_dims` count within `action_dim`.
            action_dim: Size of the model's action.
            padded_dim: M where it is more than that; its first `action_dim` numbers are the action.

        Raises:
            ConfigError: An impossible combination of noise keys.
        """
        super().__init__()
        _check(config)
        self.config = config
        self.is_single_step = config.log_prob == "single_step"
        self.chunk_shape = (config.horizon, padded_dim or action_dim)
        steps = config.num_inference_steps
        self.num_stochastic = steps - 1 if config.noise_method == "flow_cps" else steps
        self.noise_size = (steps + 1) * math.prod(self.chunk_shape) + self.is_single_step
        dims = config.executed_dims or range(action_dim)
        self.num_executed = len(dims)
        is_whole = self.num_executed == self.chunk_shape[1]
        self.register_buffer("executed_dims", None if is_whole else torch.tensor(dims), persistent=False)
        terms = self.num_stochastic * config.n_action_steps * self.num_executed
        self.log_prob_terms = float(terms) if config.log_prob == "joint_mean" else 1.0
        for name, values in step_grid(steps)._asdict().items():
            self.register_buffer(name, values, persistent=False)
        self.register_buffer("noise_level", torch.tensor(config.noise_level))
        self.noise_logit = nn.Parameter(torch.zeros(self.chunk_shape[1])) if _is_learned(config) else None

    def anneal(self, update: int) -> None:
        """Set `noise_level` for the number of finished updates."""
        start, final = self.config.noise_level, self.config.noise_level_final
        if final is not None:
            self.noise_level.fill_(start + (final - start) * min(update / self.config.anneal_updates, 1.0))

    def learned_std(self, logit: Tensor) -> Tensor:
        """Return the std `[M]` whose log-variance a tanh keeps within `noise_range` (ReinFlow, bounded noise).

        The range begins at `min_std` where that is higher: below a floor there would be no gradient to come back with.
        """
        lowest, highest = self.config.noise_range
        low, high = math.log(max(lowest, self.config.min_std)), math.log(highest)
        return (low + (high - low) * (logit.tanh() + 1) / 2).exp()

    def denoise(self, velocity: Velocity, noise: Tensor) -> Tensor:
        """Integrate the flow from the initial noise by Euler steps (the ode method); return `[N, P, M]`."""
        x, _ = self._split(noise)
        for step in range(len(self.time)):
            x = x - velocity(x, step).float() / len(self.time)
        return x

    def sample(self, velocity: Velocity, noise: Tensor) -> dict[str, Tensor]:
        """Denoise with exploration.

        Returns:
            `chains [N, K+1, P, M]` from noise to action, `log_probs`, `noise_level [N]`, and for `single_step`
            `denoise_inds [N]`.
        """
        x, step_noise = self._split(noise)
        # A copy: annealing writes the buffer in place, and a stored decision keeps its own level.
        sampled = {"noise_level": self.noise_level.repeat(len(noise))}
        inds = uniform_index(noise[:, -1], self.num_stochastic) if self.is_single_step else None
        if inds is not None:
            sampled["denoise_inds"] = inds
        steps = self._transitions(sampled["noise_level"])
        path = self._explore_executed(steps if inds is None else self._only(steps, inds))
        kicks = path.std * step_noise
        chain, means = [x], []
        for step in range(len(self.time)):
            mean = path.x_gain[:, step] * x + path.v_gain[:, step] * velocity(x, step).float()
            x = mean + kicks[:, step]
            means.append(mean)
            chain.append(x)
        sampled["chains"] = torch.stack(chain, 1)
        next_x, mean = self._pick(sampled["chains"][:, 1:], inds), self._pick(torch.stack(means, 1), inds)
        sampled["log_probs"] = self._log_probs(next_x, mean, self._pick(steps.std, inds))
        return sampled

    def evaluate(self, velocity: Velocity, sampled: TensorDictBase) -> Evaluation:
        """Evaluate stored chains under today's velocity: one call of it, for all stochastic steps at once."""
        chains = sampled["chains"]
        inds = sampled["denoise_inds"] if self.is_single_step else None
        x_gain, v_gain, std = (self._pick(part, inds) for part in self._transitions(sampled["noise_level"]))
        x, next_x = self._pick(chains[:, :-1], inds), self._pick(chains[:, 1:], inds)
        if inds is None:
            v = velocity(x, slice(0, self.num_stochastic)).float()
        else:
            v = velocity(x.squeeze(1), inds).float().unsqueeze(1)
        mean = x_gain * x + v_gain * v
        means = select_dims(mean[:, :, : self.config.n_action_steps], self.executed_dims)
        stds = select_dims(std, self.executed_dims).expand(means.shape)
        return Evaluation(self._log_probs(next_x, mean, std), self._entropy(std, len(chains)), means, stds)

    def _split(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the initial noise `[N, P, M]` and that of the steps `[N, K, P, M]`."""
        num_chunks = len(self.time) + 1
        chunks = noise[:, : num_chunks * math.prod(self.chunk_shape)].view(-1, num_chunks, *self.chunk_shape)
        return chunks[:, 0], chunks[:, 1:]

    def _transitions(self, noise_level: Tensor) -> Transition:
        """Return the Gaussians of all steps: gains `[1 or N, K, 1, 1]`, std `[1 or N, K, 1, 1 or M]`."""
        grid = StepGrid(self.time, self.next_time, self.variance_rate)
        parts = transition(self.config.noise_method, grid, noise_level[:, None])
        x_gain, v_gain, std = (part.view(-1, len(self.time), 1, 1) for part in parts)
        if self.noise_logit is not None:
            std = self.learned_std(self.noise_logit).expand(1, len(self.time), 1, -1)
        return Transition(x_gain, v_gain, floor_std(std, self.config.min_std))

    def _only(self, steps: Transition, inds: Tensor) -> Transition:
        """Make every step but `inds [N]` an ODE step."""
        numbers = torch.arange(len(self.time), device=inds.device)
        return self._else_ode((numbers == inds[:, None])[..., None, None], steps)

    def _explore_executed(self, steps: Transition) -> Transition:
        """Make every step an ODE step in the dimensions that are not executed: noise there would only disturb."""
        if self.executed_dims is None:
            return steps
        nothing = torch.zeros(self.chunk_shape[1], dtype=torch.bool, device=self.executed_dims.device)
        return self._else_ode(nothing.index_fill(0, self.executed_dims, True), steps)

    def _else_ode(self, chosen: Tensor, steps: Transition) -> Transition:
        """Return `steps` where `chosen`, which is broadcast to them, and the ODE's elsewhere."""
        ode = (1.0, -1.0 / len(self.time), 0.0)
        return Transition(*(torch.where(chosen, part, rest) for part, rest in zip(steps, ode, strict=True)))

    def _pick(self, part: Tensor, inds: Tensor | None) -> Tensor:
        """Return the stochastic steps of `[N, K, ...]`: `[N, J, ...]`, or `[N, 1, ...]` at `inds [N]`."""
        if inds is None:
            return part[:, : self.num_stochastic]
        return torch.take_along_dim(part, inds[:, None, None, None], dim=1)

    def _log_probs(self, next_x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        executed = self.config.n_action_steps
        parts = (next_x[:, :, :executed], mean[:, :, :executed], std)
        terms = log_prob_terms(*(select_dims(part, self.executed_dims) for part in parts))
        if self.config.log_prob == "joint_mean":
            return terms.mean((1, 2, 3))
        return terms.sum((2, 3) if self.config.log_prob == "per_step" else (1, 2, 3))

    def _entropy(self, std: Tensor, num_decisions: int) -> Tensor:
        """Return the entropy `[N]` of one step's H actions, averaged over the stochastic steps."""
        terms = entropy_terms(select_dims(std, self.executed_dims))
        terms = terms.expand(num_decisions, -1, self.config.n_action_steps, self.num_executed)
        return terms.mean(1).sum((1, 2))


def _is_learned(config: PolicyConfig) -> bool:
    return config.noise_method == "flow_noise" and config.learn_noise


def _check(config: PolicyConfig) -> None:
    _check_levels(config)
    if config.noise_method == "flow_cps" and config.num_inference_steps == 1:
        raise ConfigError(
            "policy.num_inference_steps = 1 leaves policy.noise_method = flow_cps without a stochastic step; use >= 2"
        )
    if _is_learned(config) and config.min_std >= config.noise_range[1]:
        raise ConfigError(
            f"policy.min_std = {config.min_std} must be below policy.noise_range = {config.noise_range}; "
            "for a fixed std set policy.learn_noise = false"
        )


def _check_levels(config: PolicyConfig) -> None:
    final = config.noise_level_final
    if (final is None) != (config.anneal_updates == 0):
        raise ConfigError(
            f"policy.noise_level_final = {final} with policy.anneal_updates = {config.anneal_updates}; "
            "set both (anneal_updates >= 1) or neither"
        )
    if final is not None and _is_learned(config):
        raise ConfigError(
            f"policy.noise_level_final = {final} needs policy.learn_noise = false: learned noise has no noise_level"
        )
    if config.noise_method == "flow_cps" and max(config.noise_level, final or 0.0) > 1:
        raise ConfigError(
            f"policy.noise_level = {config.noise_level}, policy.noise_level_final = {final}: "
            "policy.noise_method = flow_cps allows at most 1"
        )
