"""Tries a model from elsewhere once before a run: two decisions, together and alone, twice each.

A model that breaks its contract trains all the same, on ratios that mean nothing. docs/your_policy.md says the
same in words.

Shapes: J denoising steps evaluated at once, P predicted actions, A action size, M width of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from asyncflow.config.contracts import broken, name_of
from asyncflow.errors import ConfigError, ContractError
from asyncflow.policies.base import Policy
from asyncflow.policies.vla.foreign import ForeignPolicy
from asyncflow.policies.vla.policy import VLAPolicy
from asyncflow.ppo.losses import sum_steps
from asyncflow.rollout.ring import Rollout
from asyncflow.rollout.weights import make_acting_copy
from asyncflow.seeding import derive_seed, policy_noise
from asyncflow.simulators.spec import EnvSpec

NUM_TRIED = 2  # decisions
NUM_REPEATS = 2  # of a call; randomness need not show in two numbers at once
TOLERANCE_SHARE = 1 / 500  # of `Policy.ratio_tolerance`: by how much equal answers may differ, relative to the largest
EXACT_SHARE = 1e-3  # by how much they may differ at least, since batches of other sizes round otherwise
_GRADIENT = "nothing of it would be trained (torch.no_grad, detach, or every parameter frozen)"


def check_promises(policy: Policy, n_action_steps: int, spec: EnvSpec, has_velocity_alone: bool = False) -> None:
    """Try a policy on observations of random numbers; leaves it as it was.

    Args:
        policy: Of code from elsewhere, on its device.
        n_action_steps: Actions of a chunk that the environments execute.
        spec: The environments', in the policy's names.
        has_velocity_alone: Whether only its velocity is trained, as in pre-training.

    Raises:
        ContractError: A promise is broken; names the method and the promise.
    """
    _check_parameters(policy)
    _check_numbers(policy, n_action_steps, spec)
    obs = _make_obs(spec).to(next(policy.parameters()).device)
    before = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), _unchanged_buffers(policy):
        if isinstance(policy, VLAPolicy):
            _try_velocity_model(policy, obs, has_velocity_alone)
        if isinstance(policy, ForeignPolicy):
            _try_actor_critic(policy, obs)
        if not has_velocity_alone:
            _try_decisions(policy, obs)
        _check_saved(policy, before)


def _make_obs(spec: EnvSpec) -> TensorDict:
    """Return two observations of random numbers, which differ."""
    generator = torch.Generator().manual_seed(derive_seed(0, "promises"))

    def fill(empty: Tensor) -> Tensor:
        if empty.dtype == torch.uint8:
            return torch.randint(256, empty.shape, generator=generator).to(torch.uint8)
        return 0.5 * torch.randn(empty.shape, generator=generator)

    filled = spec.empty_obs(NUM_TRIED).apply(fill)
    assert isinstance(filled, TensorDict)  # only an `apply` to nothing returns None
    return filled


def _check_numbers(policy: Policy, n_action_steps: int, spec: EnvSpec) -> None:
    """Refuse a policy that does not say its sizes, or has others than the environments."""
    wanted = {"n_action_steps": n_action_steps, "action_dim": spec.action_dim}
    for name in ("horizon", "n_action_steps", "action_dim", "noise_size", "log_prob_terms"):
        found = getattr(policy, name, None)
        expected = f"{wanted[name]}, as the environments have it" if name in wanted else "a number"
        if not isinstance(found, int | float) or found != wanted.get(name, found):
            raise broken(f"{name_of(policy)}.{name}", "is", found, expected)


def _check_parameters(policy: Policy) -> None:
    """Refuse a policy that has nothing to train, or what the optimizer cannot train."""
    own = {id(parameter) for parameter in policy.parameters()}
    try:
        critic = {id(parameter) for parameter in policy.critic_parameters()}
    except Exception as error:  # such as that of a value_head which is no module
        raise ContractError(f"{name_of(_model(policy))}: has no parameters of a critic: {_one_line(error)}") from error
    if critic - own:
        raise ContractError(f"{name_of(_model(policy))}: critic_parameters yields what is not among its parameters")
    if critic == own:
        raise ContractError(
            f"{name_of(_model(policy))}: critic_parameters yields every parameter; expected those that only the value "
            "function uses: the others are the actor's, and have its step size"
        )
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ContractError(f"{name_of(_model(policy))}: has no parameter that requires a gradient; nothing to train")
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ContractError(
                f"{name_of(_model(policy))}: its parameter {name} is {parameter.dtype}; expected torch.float32 for "
                "what is trained (policy.vla.dtype says what is computed in)"
            )


def _check_saved(policy: Policy, before: Mapping[str, Tensor]) -> None:
    """Refuse buffers that move and that no checkpoint holds: a run that goes on would begin with others."""
    moved = [name for name, buffer in policy.named_buffers() if not torch.equal(buffer, before[name])]
    lost = [name for name in moved if name not in policy.state_dict()]
    if lost:
        raise ContractError(
            f"{name_of(_model(policy))}: its buffer {lost[0]} changes when it is evaluated and is in no checkpoint; "
            "register it with persistent=True"
        )


def _answer_limit(policy: Policy) -> float:
    """Return by how much equal answers may differ, relative to the largest number."""
    return max(EXACT_SHARE, policy.ratio_tolerance * TOLERANCE_SHARE)


def _model(policy: Policy) -> Any:
    return getattr(policy, "model", policy)


@dataclass(frozen=True)
class _Method:
    """A method under trial.

    Attributes:
        name: As messages name it.
        call: Inputs, each a batch -> what it returns, a batch.
        limit: By how much equal answers may differ, relative to the largest number: batches of other sizes round
            otherwise.
        has_gradient: Whether what it returns must depend on something that is trained.
    """

    name: str
    call: Callable[..., Any]
    limit: float
    has_gradient: bool = False

    def ask(self, **inputs: Any) -> Any:
        """Return what two decisions give, once each promise was tried.

        Raises:
            ContractError: It fails, changes its inputs, is not the same twice or alone, or has no gradient.
        """
        given = {name: value.clone() for name, value in inputs.items()}
        answer = self._call(given)
        for name, value in inputs.items():
            if _leaves(given[name]).keys() != _leaves(value).keys() or _difference(given[name], value) != 0:
                raise ContractError(f"{self.name} changed {name} in place; expected a copy of its own (clone())")
        if self.has_gradient and not any(x.requires_grad for x in _leaves(answer).values()):
            raise ContractError(f"{self.name} returned numbers without a gradient, so that {_GRADIENT}")
        for _ in range(NUM_REPEATS):
            self._compare(
                answer, self._call(given), "gives other numbers when it is called again (dropout, randomness)"
            )
        for row in range(NUM_TRIED):
            alone = self._call({name: value[row : row + 1].clone() for name, value in inputs.items()})
            why = "gives a decision other numbers alone than beside another one (batch statistics)"
            self._compare(_rows(answer, row), alone, why)
        return answer

    def _call(self, inputs: dict[str, Any]) -> Any:
        try:
            return self.call(*inputs.values())
        except ConfigError:
            raise
        except Exception as error:  # of whatever the model is made of
            num_rows = len(next(iter(inputs.values())))
            raise ContractError(f"{self.name} failed on {num_rows} decision(s): {_one_line(error)}") from error

    def _compare(self, first: Any, second: Any, broken_promise: str) -> None:
        difference = _difference(first, second)
        if not difference <= self.limit:
            raise ContractError(
                f"{self.name} {broken_promise}; they differ by {difference:.2g} of the largest; expected the same: the "
                "ratio of PPO has to be 1 before training"
            )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _leaves(value: Any) -> dict[Any, Tensor]:
    """Return the tensors of an answer; what holds none is left to other checks."""
    if isinstance(value, Tensor):
        return {"": value}
    if isinstance(value, TensorDictBase):
        leaves: Any = value.items(include_nested=True, leaves_only=True)
        return dict(leaves)
    return {key: x for key, x in value.items() if isinstance(x, Tensor)} if isinstance(value, Mapping) else {}


def _rows(value: Any, row: int) -> dict[Any, Tensor]:
    return {name: x[row : row + 1] for name, x in _leaves(value).items()}


def _difference(first: Any, second: Any) -> float:
    """Return by how much tensors differ, relative to the largest number; of other shapes, nothing is compared."""
    worst, other = 0.0, _leaves(second)
    for name, x in _leaves(first).items():
        if name in other and x.shape == other[name].shape and x.numel():
            a, b = (y.detach().double() for y in (x, other[name]))
            same = (a == b) | (a.isnan() & b.isnan())
            off = torch.where(same, 0.0, (a - b).abs().nan_to_num(torch.inf)).max() / a.nan_to_num(
                0, 0, 0
            ).abs().max().clamp(min=1.0)
            worst = max(worst, off.item())
    return worst


def _try_velocity_model(policy: VLAPolicy, obs: TensorDict, has_velocity_alone: bool) -> None:
    """Try `encode_prefix`, `velocity` and `value` of a model with a velocity field."""
    name, sampler, limit = name_of(policy.model), policy.sampler, _answer_limit(policy)
    generator = torch.Generator().manual_seed(derive_seed(0, "promises"))
    prefix = _Method(f"{name}.encode_prefix", policy.make_context, limit).ask(obs=obs)
    shape = (NUM_TRIED, sampler.num_stochastic, *sampler.chunk_shape)
    chunks = torch.randn(shape, generator=generator).to(sampler.time.device)
    all_steps, times = slice(0, sampler.num_stochastic), sampler.time.clone()

    def velocity(prefix: Any, x: Tensor) -> Tensor:
        return policy.velocity_field(prefix)(x, all_steps)

    method = _Method(f"{name}.velocity", velocity, limit, has_gradient=True)
    together = method.ask(prefix=prefix, x=chunks)
    field = policy.velocity_field(prefix)
    one_by_one = [field(chunks[:, step], step) for step in range(sampler.num_stochastic)]
    method._compare(together, torch.stack(one_by_one, 1), "gives other numbers for one denoising step than for all")
    if not torch.equal(sampler.time, times):
        raise ContractError(f"{name}.velocity changed time in place; expected a copy of its own (clone())")
    if not has_velocity_alone:
        _Method(f"{name}.value", policy.value, limit, has_gradient=True).ask(prefix=prefix)


def _try_actor_critic(policy: ForeignPolicy, obs: TensorDict) -> None:
    """Try `forward`, `get_value` and `evaluate_actions` of a model that brings its own log-probs."""
    name, limit = name_of(policy.model), _answer_limit(policy)
    device = next(policy.parameters()).device
    noisy = obs.clone().set("noise", policy_noise(0, range(NUM_TRIED), 0, policy.noise_size).to(device))
    actions = _Method(f"{name}.forward", policy.model, limit).ask(obs=noisy)
    policy.check_actions(actions, NUM_TRIED)
    _Method(f"{name}.get_value", policy.get_value, limit, has_gradient=True).ask(obs=obs)

    def evaluate(obs: TensorDict, actions: Tensor) -> dict[str, Tensor]:
        log_probs, entropy = policy.evaluate(obs, actions)
        return {"log_probs": log_probs, "entropy": entropy}

    _Method(f"{name}.evaluate_actions", evaluate, limit, has_gradient=True).ask(
        obs=obs, actions=actions.detach().float()
    )


def _try_decisions(policy: Policy, obs: TensorDict) -> None:
    """Decide with the acting copy and evaluate with the policy itself: whatever it is, the ratio has to be 1."""
    name, limit = name_of(_model(policy)), _answer_limit(policy)
    try:
        acting = make_acting_copy(policy)
    except Exception as error:  # of whatever it holds: a lock, a tensor that was computed
        raise ContractError(
            f"{name}: cannot be copied for the collector (copy.deepcopy): {_one_line(error)}"
        ) from error
    device = next(policy.parameters()).device
    noise = policy_noise(0, range(NUM_TRIED), 0, policy.noise_size).to(device)
    with torch.no_grad():
        encoded = _Method(f"{name}.encode_obs", acting.encode_obs, limit).ask(obs=obs)

        def sample(obs: TensorDict, noise: Tensor) -> TensorDict:
            return acting.sample_actions(obs, "train", noise)

        decision = _Method(f"{name}.sample_actions", sample, limit).ask(obs=encoded, noise=noise)
    _check_fields(f"{name}.sample_actions", decision, ("log_probs", "values", "actions"))
    wanted = (NUM_TRIED, policy.horizon, policy.action_dim)
    if decision["actions"].shape != wanted:
        raise broken(f"{name}.sample_actions", "returned as actions", decision["actions"], f"the shape {wanted}")
    batch = decision.clone().set("obs", encoded)
    evaluated = _Method(f"{name}.default_forward", policy.default_forward, limit, has_gradient=True).ask(batch=batch)
    _check_fields(f"{name}.default_forward", evaluated, ("log_probs", "values", "entropy"))
    for field in ("log_probs", "values"):
        if not evaluated[field].requires_grad:
            raise ContractError(f"{name}.default_forward returned {field} without a gradient, so that {_GRADIENT}")
    if evaluated["log_probs"].shape != decision["log_probs"].shape:
        shape = tuple(decision["log_probs"].shape)
        raise broken(f"{name}.default_forward", "returned as log_probs", evaluated["log_probs"], f"the shape {shape}")
    _Method(f"{name}.get_value", policy.get_value, limit).ask(obs=encoded)
    _check_ratio(policy, decision["log_probs"], evaluated["log_probs"].detach())
    _check_own_weights(policy, acting, batch)


def _check_own_weights(policy: Policy, acting: Policy, batch: TensorDict) -> None:
    """Refuse a model whose copy would act with weights that are just being trained."""
    evaluated = acting.default_forward(batch.clone())
    total = torch.stack([evaluated[field].sum() for field in ("log_probs", "values")]).sum()
    own = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(total, list(own.values()), allow_unused=True)
    shared = [name for name, gradient in zip(own, gradients, strict=True) if gradient is not None]
    if shared:
        raise ContractError(
            f"{name_of(_model(policy))}: its copy for the collector (copy.deepcopy) computes with {shared[0]} of the "
            "original; expected its own: no function in a model may hold that model, as a lambda in __init__ does"
        )


def _check_fields(method: str, answer: Any, names: tuple[str, ...]) -> None:
    """Refuse an answer that lacks a field, or has one that is not a number for each decision."""
    if not isinstance(answer, TensorDictBase):
        raise broken(method, "returned", answer, f"a TensorDict of {', '.join(names)}")
    for name in names:
        if name not in answer.keys():  # noqa: SIM118  a TensorDict iterates rows
            raise broken(method, "returned", dict(answer.items()), f"also {name}")
        field = answer[name]
        is_free = name in ("actions", "log_probs")  # of a step each, or of a whole decision
        if not field.is_floating_point() or not (field.dim() == 1 or (is_free and field.dim() > 1)):
            raise broken(method, f"returned as {name}", field, f"floats of shape ({NUM_TRIED},)")


def check_first_ratio(policy: Policy, rollout: Rollout, num_minibatches: int) -> None:
    """Evaluate a minibatch's worth of real decisions under the weights that took them; leaves the policy as it was.

    Args:
        policy: What is trained, before its first step.
        rollout: The first one.
        num_minibatches: How many its decisions make.

    Raises:
        ContractError: PPO's ratio is not 1.
    """
    num_steps = max(1, len(rollout.data) // num_minibatches)
    batch = rollout.data[:num_steps].clone()
    batch["obs"] = rollout.obs[:num_steps].clone()
    decisions = batch.flatten(0, 1)[batch["valid"].flatten()]
    if len(decisions):
        with torch.no_grad(), _unchanged_buffers(policy):
            evaluated = policy.default_forward(decisions)["log_probs"]
        _check_ratio(policy, decisions["log_probs"], evaluated)  # sync: once a run


@contextmanager
def _unchanged_buffers(policy: Policy) -> Iterator[None]:
    buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in buffers.items():
                policy.get_buffer(name).copy_(buffer)


def _check_ratio(policy: Policy, acted: Tensor, evaluated: Tensor) -> None:
    """Refuse log-probs, [B] or [B, J], of the same decisions under the same weights that differ on average."""
    nats = (sum_steps(evaluated - acted).abs() * policy.log_prob_terms).mean().item()
    if nats > policy.ratio_tolerance:
        raise ContractError(
            f"{name_of(_model(policy))}: before any training, decisions have other log-probs in training than when "
            f"they were taken, by {nats:.2g} nats on average (at most its ratio_tolerance = "
            f"{policy.ratio_tolerance:g}); expected the same: PPO's ratio is 1 then"
        )
