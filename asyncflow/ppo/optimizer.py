"""Adam that skips steps that are not finite, undoes what was not finished, and names its state.

The gradients may come from any loss.

`drop_gradients`, `clip_gradients` and `step_if` do what `Adam.zero_grad`, `clip_grad_norm_` and `Adam.step` do, bit for
bit. They do not call those: a minibatch of a small network costs little more than the bookkeeping around Adam's kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from asyncflow.errors import CheckpointError
from asyncflow.kernels import AdamTensors, adam_step_each, copy_each, norm_each, scale_each

_STATE = ("step", "exp_avg", "exp_avg_sq")


class GuardedAdam(torch.optim.Adam):
    """Fused Adam over named parameters.

    `remember` and `put_back` need one copy of the parameters and of Adam's state, allocated once: three times the
    memory of the trainable parameters, beside the two times of the state itself.
    """

    def __init__(self, groups: list[dict[str, Any]], named: Mapping[str, Tensor], eps: float) -> None:
        """Allocate the copy.

        Args:
            groups: As Adam takes them.
            named: All parameters of the groups, by name.
            eps: Adam's epsilon.
        """
        super().__init__(groups, eps=eps, fused=True)
        self._named = dict(named)
        self._by_type = [(group, same) for group in self.param_groups for same in _split_by_type(group["params"])]
        self._copies: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            state = {f"{name}.{key}": tensor for key, tensor in _initial_state(parameter).items()}
            self._copies |= {name: torch.empty_like(parameter.detach())} | state
        self._remembered: dict[str, Tensor] = {}

    def drop_gradients(self) -> None:
        """Forget all gradients, and free their memory."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def clip_gradients(self, limit: float) -> Tensor:
        """Scale each group's gradients down to the norm `limit`; return the norms before that, [groups] float32."""
        groups = [list(_gradients(group["params"]).values()) for group in self.param_groups]
        norms = torch.stack([self._norm(gradients) for gradients in groups])
        for gradients, scale in zip(groups, (limit / (norms + 1e-6)).clamp(max=1.0), strict=True):
            if gradients:
                scale_each(gradients, scale)
        return norms

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        if not gradients:
            return torch.zeros((), device=next(iter(self._named.values())).device)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norm_each(gradients)))
        return norm.float()

    @torch.no_grad()
    def step_if(self, is_usable: Tensor) -> None:
        """Take a step if `is_usable`, [] bool on the device, is true; else nothing changes. Reads nothing back."""
        for group, parameters in self._by_type:
            gradients = _gradients(parameters)
            if not gradients:
                continue
            for parameter in gradients:
                if not self.state[parameter]:
                    self.state[parameter] = _initial_state(parameter)
            states = [self.state[parameter] for parameter in gradients]
            steps, averages, squares = ([state[key] for state in states] for key in _STATE)
            rates = {name: group[name] for name in ("lr", "betas", "eps")}
            tensors = AdamTensors(list(gradients), list(gradients.values()), averages, squares, steps)
            adam_step_each(tensors, is_usable, **rates)

    def remember(self) -> None:
        """Copy parameters and state for `put_back`."""
        live = self._live_tensors()
        self._remembered = {name: self._copies[name] for name in live}
        copy_each(list(self._remembered.values()), list(live.values()))

    def put_back(self) -> None:
        """Make parameters and state what they were at the last `remember`; state that did not exist is removed."""
        for name, parameter in self._named.items():
            if f"{name}.step" not in self._remembered:
                self.state.pop(parameter, None)
        live = self._live_tensors()
        copy_each([live[name] for name in self._remembered], list(self._remembered.values()))

    def state_tensors(self) -> dict[str, Tensor]:
        """Return `<parameter>.step`, `.exp_avg` and `.exp_avg_sq` of every parameter that was trained; not copied."""
        return {
            f"{name}.{key}": tensor
            for name, parameter in self._named.items()
            for key, tensor in self.state.get(parameter, {}).items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the state by copies of what `state_tensors` returned.

        Raises:
            CheckpointError: A tensor is unknown, missing or of another shape; nothing was changed.
        """
        self._check_state_tensors(tensors)
        for name, parameter in self._named.items():
            self.state.pop(parameter, None)
            if f"{name}.step" in tensors:
                names = {key: f"{name}.{key}" for key in _STATE}
                self.state[parameter] = {k: tensors[n].to(self._copies[n], copy=True) for k, n in names.items()}

    def _live_tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._named.items()} | self.state_tensors()

    def _check_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        expected = [{f"{name}.{key}" for key in _STATE} for name in self._named]
        missing = set().union(*(names - set(tensors) for names in expected if names & set(tensors)))
        unknown = set(tensors).difference(*expected)
        _refuse("unknown", unknown)
        _refuse("missing", missing)
        shapes = {name: (list(tensor.shape), list(self._copies[name].shape)) for name, tensor in tensors.items()}
        _refuse("misshapen", {f"{name} {ours} not {its}" for name, (ours, its) in shapes.items() if ours != its})


def _gradients(parameters: list[Tensor]) -> dict[Tensor, Tensor]:
    """Return the gradients of those parameters that have one."""
    return {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}


def _split_by_type(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Return the parameters of each type: on a GPU a fused kernel takes one type alone."""
    types = dict.fromkeys(parameter.dtype for parameter in parameters)
    return [[parameter for parameter in parameters if parameter.dtype == each] for each in types]


def _initial_state(parameter: Tensor) -> dict[str, Tensor]:
    """Return Adam's state of a parameter before its first step; fused kernels count steps in float32 on the device."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step} | {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}


def _refuse(what: str, names: set[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise CheckpointError(f"the optimizer's state does not fit the policy: {what}: {shown}")
