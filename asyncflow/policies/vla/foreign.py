"""Models from elsewhere: how they are loaded, and those that bring their own log-probs as policies.

docs/your_policy.md describes what is asked of such a model. A model with a velocity field becomes a `VLAPolicy`
instead.

Shapes: N decisions, P predicted actions, H executed actions, A action size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from asyncflow.config.contracts import broken, name_of
from asyncflow.config.plugins import import_class
from asyncflow.config.robomimic_file import load_restricted
from asyncflow.config.sections import PolicyConfig, VLAConfig
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.policies.base import REDUCED_PRECISION_NATS, Mode, Policy

VELOCITY_METHODS = ("encode_prefix", "velocity", "value")
ACTOR_CRITIC_METHODS = ("forward", "get_value", "evaluate_actions")


def find_model_class(config: VLAConfig) -> type[nn.Module]:
    """Import `model_class`, if the user named it for this command or it is asyncflow's own.

    Raises:
        ConfigError: As `import_class`.
    """
    assert config.model_class is not None  # the caller's condition
    return import_class(config.model_class, "policy.vla.model_class", "torch.nn.Module")


def without_weights(config: PolicyConfig) -> PolicyConfig:
    """Return how to build a policy whose weights a checkpoint holds: without `model_path`, unless the class needs it.

    Raises:
        ConfigError: As `find_model_class`.
    """
    if config.kind != "vla" or config.vla.model_class is None or config.vla.model_path is None:
        return config
    if hasattr(find_model_class(config.vla), "from_pretrained"):
        return config
    return config.model_copy(update={"vla": config.vla.model_copy(update={"model_path": None})})


def load_model(config: VLAConfig) -> nn.Module:
    """Build `model_class` with `model_config`, and load `model_path` where there is one.

    A class with `from_pretrained` is given the path; any other is built, and takes a state dict.

    Raises:
        ConfigError: The class, its arguments or the weights cannot be used.
    """
    cls: Any = find_model_class(config)
    arguments = deepcopy(config.model_kwargs)  # checkpoints hold them: a model that changes its own changes no file
    try:
        if config.model_path is not None and hasattr(cls, "from_pretrained"):
            model = cls.from_pretrained(config.model_path, **arguments)
        else:
            model = cls(**arguments)
    except (TypeError, ValueError, AttributeError, OSError) as error:
        raise ConfigError(
            f"policy.vla.model_class = {config.model_class}: cannot build it: {_one_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):  # `from_pretrained` may return anything
        raise ConfigError(f"policy.vla.model_class = {config.model_class}: not a torch.nn.Module")
    lazy = [name for name, parameter in model.named_parameters() if isinstance(parameter, UninitializedParameter)]
    if lazy:
        raise ConfigError(
            f"policy.vla.model_class = {config.model_class}: its parameter {lazy[0]} has no size yet (such as one of "
            "nn.LazyLinear); let the class call the layer once when it is built, or give the size"
        )
    if config.model_path is not None and not hasattr(cls, "from_pretrained"):
        try:
            model.load_state_dict(_read_weights(Path(config.model_path)))
        except (OSError, RuntimeError, SafetensorError, ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"policy.vla.model_path = {config.model_path}: {_one_line(error)}") from error
    return model


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        weights: dict[str, Tensor] = load_restricted(path)
    except CheckpointError as error:
        raise ConfigError(f"policy.vla.model_path = {error}") from None
    return weights


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def has_methods(model: nn.Module, names: Sequence[str]) -> bool:
    """Tell whether a model has all of these methods of its own; every module has a `forward` that only raises."""
    return all(callable(getattr(model, name, None)) for name in names) and (
        "forward" not in names or type(model).forward is not nn.Module.forward
    )


class ForeignPolicy(Policy):
    """A model that acts, values and evaluates its own actions.

    `forward(obs)` returns actions [N, P, A]: a deterministic function of `obs`, which holds `noise` [N, noise_size]
    when it is to explore. `get_value(obs)` returns [N]. `evaluate_actions(obs, actions [N, H, A])` returns a mapping
    with `log_probs` [N], joint, of actions in the simulator's units, and optionally `entropy` [N].
    """

    def __init__(self, config: PolicyConfig, model: nn.Module, action_dim: int) -> None:
        """Wrap a model.

        Raises:
            ConfigError: `policy.freeze_backbone` is set, which needs a prefix, or `policy.mapping` leaves out
                dimensions of its actions, whose log-prob only the model itself can take.
        """
        super().__init__()
        if config.freeze_backbone:
            raise ConfigError(
                f"policy.freeze_backbone = true: {config.vla.model_class} has no encode_prefix; freeze parameters in "
                "the model itself (requires_grad_(False)), or give it a velocity field"
            )
        if config.executed_dims is not None:
            raise ConfigError(
                f"policy.mapping.action.select = {config.mapping.action.select}: leaves out dimensions of which "
                f"{config.vla.model_class} takes the log-prob; let the model itself leave them out"
            )
        self.horizon, self.n_action_steps, self.action_dim = config.horizon, config.n_action_steps, action_dim
        self.noise_size = int(getattr(model, "noise_size", config.horizon * action_dim))
        self.log_prob_terms = 1.0
        self.ratio_tolerance = REDUCED_PRECISION_NATS  # which precision the model computes in is its own affair
        self.model: Any = model
        self.train()

    def train(self, mode: bool = True) -> ForeignPolicy:
        """Stay in evaluation mode: dropout would make training re-evaluate other decisions than were taken."""
        return super().train(False)

    @torch.no_grad()
    def sample_actions(self, obs: TensorDictBase, mode: Mode, noise: Tensor) -> TensorDict:
        """Decide; `train` hands the model its noise."""
        seen = obs.copy()
        if mode == "train":
            seen["noise"] = noise
        actions = self.check_actions(self.model(seen), len(noise)).float()
        decision = {"actions": actions}
        if mode == "train":
            log_probs, _ = self.evaluate(obs, actions)
            decision |= {"log_probs": log_probs, "values": self.get_value(obs)}
        return TensorDict(decision, batch_size=noise.shape[:1])

    def default_forward(self, batch: TensorDictBase) -> TensorDict:
        """Evaluate stored decisions; see `Policy.default_forward`."""
        log_probs, entropy = self.evaluate(batch["obs"], batch["actions"])
        evaluation = {"log_probs": log_probs, "values": self.get_value(batch["obs"]), "entropy": entropy}
        return TensorDict(evaluation, batch_size=batch.batch_size)

    def get_value(self, obs: TensorDictBase) -> Tensor:
        """Return V(obs), [N] float32."""
        return require_row(self.model.get_value(obs), len(obs), self.model, "get_value").float()

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the model's `value_head`, if it has one."""
        head = getattr(self.model, "value_head", None)
        return iter(()) if head is None else head.parameters()

    def evaluate(self, obs: TensorDictBase, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropy, [N] float32, of the first H of `actions` [N, P, A]."""
        evaluated = self.model.evaluate_actions(obs, actions[:, : self.n_action_steps])
        if not isinstance(evaluated, Mapping | TensorDictBase) or "log_probs" not in evaluated.keys():  # noqa: SIM118
            method, expected = f"{name_of(self.model)}.evaluate_actions", "a dict or TensorDict with log_probs"
            raise broken(method, "returned", evaluated, expected)
        log_probs = require_row(evaluated["log_probs"], len(actions), self.model, "evaluate_actions", "log_probs")
        if "entropy" not in evaluated.keys():  # noqa: SIM118
            return log_probs.float(), torch.zeros_like(log_probs, dtype=torch.float32)
        entropy = require_row(evaluated["entropy"], len(actions), self.model, "evaluate_actions", "entropy")
        return log_probs.float(), entropy.float()

    def check_actions(self, actions: Any, num_rows: int) -> Tensor:
        """Return what the model's `forward` did, if that is a chunk for each decision."""
        expected = (num_rows, self.horizon, self.action_dim)
        if not isinstance(actions, Tensor) or actions.shape != expected:
            raise broken(
                f"{name_of(self.model)}.forward",
                "returned",
                actions,
                f"a tensor of shape {expected}: decisions, policy.horizon, action size",
            )
        return actions


def require_row(result: Any, num_rows: int, model: nn.Module, method: str, field: str = "") -> Tensor:
    """Return what a model's method did, if it is a number for each decision, [N]; of 16 bits under autocast alone.

    Raises:
        ContractError: It is something else.
    """
    is_row = isinstance(result, Tensor) and result.shape == (num_rows,) and result.is_floating_point()
    if not is_row or (result.dtype in (torch.float16, torch.bfloat16) and not _is_autocast()):
        verb = f"returned as {field}" if field else "returned"
        raise broken(f"{name_of(model)}.{method}", verb, result, f"float32 of shape ({num_rows},), one a decision")
    return cast(Tensor, result)


def _is_autocast() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
