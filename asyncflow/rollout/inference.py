"""Inference: the collector's decisions as the policy computes them, compiled, or replayed from a CUDA graph.

`policy.compile` chooses among the three. `Policy.encode_obs` runs before and is neither compiled nor captured.

Both ways fix what a decision does before the first rollout. What changes from version to version must therefore be in
tensors that are written in place: the parameters and buffers of `weights.changing_tensors`, the annealed `noise_level`
among them. A policy that branches on a number that changes, or keeps one in Python, would go on with the old one.

Shapes: n decisions of one group of environments.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch._inductor import config as inductor_config

from asyncflow.config.sections import CompileMode
from asyncflow.errors import ConfigError
from asyncflow.policies.base import Policy
from asyncflow.rollout.streams import capture_graph

Sampler = Callable[[TensorDictBase, Tensor], TensorDict]
"""(observations [n], noise [n, noise_size]) -> decision [n], as `Policy.sample_actions` in mode `train`."""
Decide = Callable[[dict[str, Any], Tensor], dict[str, Tensor]]
Capture = Callable[[Callable[[], TensorDict], torch.device], tuple[TensorDict, Callable[[], None]]]

BACKEND = "inductor"


def make_sampler(policy: Policy, mode: CompileMode, obs: TensorDictBase, noise: Tensor) -> Sampler:
    """Return how a policy decides; compiling or capturing happens here, in the building thread.

    Args:
        policy: The acting copy, whose weights are written in place from now on.
        mode: What is done to it.
        obs: [n] observations on the policy's device, whose shapes are those of every call.
        noise: [n, noise_size] likewise.

    Raises:
        ConfigError: The policy cannot be compiled or captured.
    """

    def sample(obs: TensorDictBase, noise: Tensor) -> TensorDict:
        return policy.sample_actions(obs, "train", noise)

    if mode == "none":
        return sample
    try:
        return CompiledSampler(policy, obs, noise) if mode == "compile" else GraphedSampler(sample, obs, noise)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"policy.compile = {mode}: the policy does not allow it ({type(error).__name__}: {reason}); "
            "policy.compile = none always works"
        ) from error


class CompiledSampler:
    """A policy behind `torch.compile`: fewer and larger kernels, from other code, so that results differ by rounding.

    Not `mode="reduce-overhead"`: its CUDA graphs belong to the thread that compiled (pytorch/pytorch#123177).
    """

    def __init__(self, policy: Policy, obs: TensorDictBase, noise: Tensor) -> None:
        """Compile for the shapes of `obs` and `noise`."""

        def decide(obs: dict[str, Any], noise: Tensor) -> dict[str, Tensor]:
            decision: dict[str, Tensor] = policy.sample_actions(TensorDict(obs, [len(noise)]), "train", noise).to_dict()
            return decision

        self._decide = torch.compile(_with_code_of_its_own(decide), backend=BACKEND, dynamic=False)
        # In this process alone: compiler processes of torch's would outlive the compiling.
        with inductor_config.patch(compile_threads=1):
            self(obs, noise)

    def __call__(self, obs: TensorDictBase, noise: Tensor) -> TensorDict:
        """Decide. Strides are made those of the first call: others would be compiled again, and round otherwise."""
        state: dict[str, Any] = obs.contiguous().to_dict()
        with torch.no_grad():
            decision = self._decide(state, noise.contiguous())
        return TensorDict(decision, noise.shape[:1])


def _with_code_of_its_own(function: Decide) -> Decide:
    """Return a copy of a function. Compiled code is kept by code object, and after eight times it is given up on."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)


class GraphedSampler:
    """A CUDA graph of one decision, replayed on the caller's stream; the same kernels as without it."""

    def __init__(
        self,
        sample: Sampler,
        obs: TensorDictBase,
        noise: Tensor,
        capture: Capture = capture_graph,
    ) -> None:
        """Capture a decision on copies of `obs` and `noise`, which are the graph's inputs from now on."""
        self._obs, self._noise = obs.clone(), noise.clone()
        with torch.no_grad():
            self._decision, self._replay = capture(lambda: sample(self._obs, self._noise), noise.device)

    def __call__(self, obs: TensorDictBase, noise: Tensor) -> TensorDict:
        """Decide; the decision is a copy, which the next replay leaves alone."""
        for name, static in self._obs.items(include_nested=True, leaves_only=True):
            static.copy_(obs[name])
        self._noise.copy_(noise)
        self._replay()
        return self._decision.clone()
