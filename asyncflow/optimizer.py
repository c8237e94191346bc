"""Adam that skips steps that are not finite, undoes what was not finished, and names its state.

Owns the optimizer's state. It must not know about losses, nor what a step was computed from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from asyncflow.errors import CheckpointError

_STATE = ("step", "exp_avg", "exp_avg_sq")


class GuardedAdam(torch.optim.Adam):
    """Fused Adam over named parameters.

    `remember` and `put_back` need one copy of the parameters and of Adam's state, allocated once: three times the
    memory of the trainable parameters, beside the two times of the state itself.
    """

    found_inf: Tensor  # Adam hands it to its fused kernels; a GradScaler sets it likewise

    def __init__(self, groups: list[dict[str, Any]], named: Mapping[str, Tensor], eps: float) -> None:
        """Allocate the copy.

        Args:
            groups: As Adam takes them.
            named: All parameters of the groups, by name.
            eps: Adam's epsilon.
        """
        super().__init__(groups, eps=eps, fused=True)
        self._named = dict(named)
        self._copies: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            self._copies |= {name: torch.empty_like(parameter.detach())} | _empty_state(name, parameter)
        self._remembered: dict[str, Tensor] = {}

    def step_if(self, is_finite: Tensor) -> None:
        """Take a step if `is_finite`, [] bool on the device, is true; else nothing changes. Reads nothing back."""
        self.found_inf = (~is_finite).float()
        self.step()

    def remember(self) -> None:
        """Copy parameters and state for `put_back`."""
        live = self._live_tensors()
        self._remembered = {name: self._copies[name] for name in live}
        torch._foreach_copy_(list(self._remembered.values()), list(live.values()))

    def put_back(self) -> None:
        """Make parameters and state what they were at the last `remember`; state that did not exist is removed."""
        for name, parameter in self._named.items():
            if f"{name}.step" not in self._remembered:
                self.state.pop(parameter, None)
        live = self._live_tensors()
        torch._foreach_copy_([live[name] for name in self._remembered], list(self._remembered.values()))

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


def _empty_state(name: str, parameter: Tensor) -> dict[str, Tensor]:
    """Return tensors like Adam's state of a parameter; its fused kernels count steps in float32 on the device."""
    step = torch.empty((), dtype=torch.float32, device=parameter.device)
    moments = {f"{name}.{key}": torch.empty_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
    return {f"{name}.step": step} | moments


def _refuse(what: str, names: set[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise CheckpointError(f"the optimizer's state does not fit the policy: {what}: {shown}")
