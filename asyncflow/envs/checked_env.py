"""Environments from elsewhere, their contract checked at every call.

What they get is theirs and what they return is copied, so that neither side can change what the other one keeps.

Shapes: N environments, n of them addressed by one call, H executed actions of a chunk, A action size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from asyncflow.config.contracts import broken, describe, name_of
from asyncflow.config.plugins import ENVS, build_plugin
from asyncflow.config.sections import EnvConfig
from asyncflow.envs.base import ChunkResult, ChunkSpan, Fault, VecEnv
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.errors import ContractError
from asyncflow.simulators.checked import check_spec
from asyncflow.simulators.spec import EnvSpec
from asyncflow.terminal import tell_once

_FLAGS = ("terminated", "truncated", "broken")
_COUNTS = ("executed", "episode_length")
_NUMBERS = ("rewards", "episode_return")


class CheckedVecEnv(VecEnv):
    """Others' environments; see `VecEnv` for what the methods do."""

    def __init__(self, env: VecEnv, chunk_length: int, num_envs: int, task: str) -> None:
        """Take over environments, which nobody else uses from now on.

        Args:
            env: The environments.
            chunk_length: H, as it was asked for.
            num_envs: N, as it was asked for.
            task: The name under which they are registered.

        Raises:
            ContractError: Their spec or their number is not what it must be.
        """
        self.env, self._name, self._chunk_length = env, name_of(env), chunk_length
        self.n_action_steps = chunk_length
        self.num_envs = num_envs
        if getattr(env, "num_envs", None) != num_envs:
            raise broken(f"{self._name}.num_envs", "is", getattr(env, "num_envs", None), f"{num_envs}, as asked for")
        self.notices = self._check_notices(env.notices)
        self.spec = check_spec(getattr(env, "spec", None), self._name)
        # Its checkpoints name what builds it again, whatever it is made of.
        self._simulator_spec = replace(check_spec(env.simulator_spec, self._name), task=task)

    @property
    def simulator_spec(self) -> EnvSpec:
        """The spec that the environments can be built from again."""
        return self._simulator_spec

    def reset(self, seed: int, journal: EpisodeJournal | None = None) -> TensorDict:
        """Start or rebuild episodes; the environments get a journal of their own."""
        answer = self.env.reset(seed, None if journal is None else _copy_journal(journal))
        return self._check_obs(answer, self.num_envs, "reset", "returned")

    def journal(self) -> EpisodeJournal:
        """Return the environments' journal."""
        answer = self.env.journal()
        if not isinstance(answer, EpisodeJournal) or len(answer.episodes) != self.num_envs:
            raise self._broken("journal", "returned", answer, f"an EpisodeJournal of {self.num_envs} environments")
        return answer.copy()

    def step_async(self, actions: Tensor, env_ids: range) -> None:
        """Start one chunk, of which the environments get a copy."""
        self.env.step_async(actions.clone(), env_ids)

    def step_wait(self, env_ids: range) -> ChunkResult:
        """Wait for a chunk."""
        answer, num_rows = self.env.step_wait(env_ids), len(env_ids)
        if not isinstance(answer, ChunkResult):
            raise self._broken("step_wait", "returned", answer, "an asyncflow.envs.base.ChunkResult")
        result = ChunkResult(
            obs=self._check_obs(answer.obs, num_rows, "step_wait", "returned as obs"),
            final_obs=self._check_obs(answer.final_obs, num_rows, "step_wait", "returned as final_obs"),
            faults=self._check_tuple("faults", answer.faults, Fault),
            spans=self._check_tuple("spans", answer.spans, ChunkSpan),
            succeeded=None if answer.succeeded is None else self._check_rows("succeeded", answer.succeeded, num_rows),
            **{name: self._check_rows(name, getattr(answer, name), num_rows) for name in _NUMBERS + _COUNTS + _FLAGS},
        )
        self._check_ends(result, env_ids)
        return result

    def interrupt(self) -> None:
        """End every wait for simulators."""
        self.env.interrupt()

    def close(self) -> None:
        """Stop the simulators; an error of theirs at the end is told, and ends nothing."""
        try:
            self.env.close()
        except Exception as error:  # whatever a package's own code raises
            tell_once(f"{self._name}.close", f"{self._name}.close raised {type(error).__name__}: {error}")

    def _check_notices(self, notices: Any) -> tuple[str, ...]:
        if not isinstance(notices, tuple | list) or not all(isinstance(notice, str) for notice in notices):
            raise self._broken("notices", "is", notices, "a tuple of texts")
        return tuple(notices)

    def _check_obs(self, obs: Any, num_rows: int, method: str, verb: str) -> TensorDict:
        """Return a copy of observations, [num_rows]."""
        wanted = _leaves(self.spec.empty_obs(num_rows))
        expected = f"a TensorDict of {_describe_leaves(wanted)}, on the CPU"
        if not isinstance(obs, TensorDictBase):
            raise self._broken(method, verb, obs, expected)
        given = _leaves(obs)
        if given.keys() != wanted.keys() or not all(_is_alike(given[name], wanted[name]) for name in wanted):
            raise ContractError(f"{self._name}.{method} {verb} {_describe_leaves(given)}; expected {expected}")
        copied = TensorDict({}, batch_size=[num_rows])
        for name, values in given.items():
            self._check_finite(values, method, f"{verb} {_dotted(name)}")
            copied[name] = values.clone()
        return copied

    def _check_rows(self, name: str, values: Any, num_rows: int) -> Tensor:
        """Return a copy of one field of a result, [num_rows] or [num_rows, H]."""
        shape = (num_rows, self._chunk_length) if name == "rewards" else (num_rows,)
        kind, dtype = _kind_of(name)
        is_tensor = isinstance(values, Tensor) and not values.requires_grad and values.device.type == "cpu"
        if not is_tensor or values.shape != shape or not _is_of_kind(values, dtype):
            raise self._broken("step_wait", f"returned as {name}", values, f"{kind} of shape {shape}, on the CPU")
        self._check_finite(values, "step_wait", f"returned as {name}")
        copied: Tensor = values.to(dtype, copy=True)
        return copied

    def _check_finite(self, values: Tensor, method: str, verb: str) -> None:
        if not bool(values.isfinite().all()):
            raise ContractError(
                f"{self._name}.{method} {verb} numbers that are not finite; expected `broken` for such an environment, "
                "and the first observation of its next episode"
            )

    def _check_tuple(self, name: str, values: Any, kind: type[Any]) -> tuple[Any, ...]:
        if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
            raise self._broken("step_wait", f"returned as {name}", values, f"a tuple of {kind.__name__}")
        return values

    def _check_ends(self, result: ChunkResult, env_ids: range) -> None:
        """Refuse what contradicts itself, which would be trained on as it is."""
        executed, has_ended = result.executed, result.terminated | result.truncated
        is_wrong = (executed < 0) | (executed > self._chunk_length) | ((executed == 0) != result.broken)
        is_wrong |= (result.terminated & result.truncated) | (result.broken & has_ended)
        is_wrong |= result.is_success & ~has_ended
        for row in is_wrong.nonzero().flatten().tolist()[:1]:
            found = ", ".join(f"{name} {getattr(result, name)[row].item()}" for name in ("executed", *_FLAGS))
            raise ContractError(
                f"{self._name}.step_wait returned for environment {env_ids[row]}: {found}; expected 1 to "
                f"{self._chunk_length} executed steps (0 where broken), and one end at most"
            )

    def _broken(self, method: str, verb: str, came: Any, expected: str) -> ContractError:
        return broken(f"{self._name}.{method}", verb, came, expected)


def build_registered(config: EnvConfig, chunk_length: int, num_envs: int, seed: int) -> VecEnv:
    """Build the environments that an installed package registered as `config.task`; arguments as `make_vec_env`."""
    arguments = (config.model_copy(deep=True), chunk_length, num_envs, seed)
    env = build_plugin(ENVS, config.task, arguments, VecEnv)  # type: ignore[type-abstract]
    try:
        return CheckedVecEnv(env, chunk_length, num_envs, config.task)
    except ContractError:
        env.close()
        raise


def _copy_journal(journal: EpisodeJournal) -> EpisodeJournal:
    chunks = [[chunk.clone() for chunk in chunks] for chunks in journal.chunks]
    return EpisodeJournal(list(journal.episodes), chunks, list(journal.is_lost))


def _kind_of(name: str) -> tuple[str, torch.dtype]:
    """Return what a field of a result holds, in words, and the dtype of its copy."""
    if name in (*_FLAGS, "succeeded"):
        return "bool flags", torch.bool
    return ("whole numbers", torch.int64) if name in _COUNTS else ("floats", torch.float32)


def _is_of_kind(values: Tensor, dtype: torch.dtype) -> bool:
    if dtype.is_floating_point:
        return values.is_floating_point()
    is_integer = not (values.is_floating_point() or values.is_complex() or values.dtype is torch.bool)
    return values.dtype is torch.bool if dtype is torch.bool else is_integer


def _leaves(obs: Any) -> dict[Any, Tensor]:
    return dict(obs.items(include_nested=True, leaves_only=True))


def _is_alike(values: Tensor, wanted: Tensor) -> bool:
    is_plain = not values.requires_grad and values.device.type == "cpu"
    return is_plain and values.shape == wanted.shape and values.dtype == wanted.dtype


def _describe_leaves(leaves: dict[Any, Tensor]) -> str:
    return ", ".join(f"{_dotted(name)}: {describe(values)}" for name, values in leaves.items()) or "nothing"


def _dotted(name: str | tuple[str, ...]) -> str:
    return name if isinstance(name, str) else ".".join(name)
