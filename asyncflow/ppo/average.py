"""An exponential moving average of the weights, with which evaluations act and checkpoints decide.

Averaging smooths what the last few updates did to a policy (Polyak and Juditsky, 1992); the run itself collects and
trains with the weights as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from asyncflow.kernels import copy_each


class WeightAverage:
    """`average = decay * average + (1 - decay) * weights` after every update, of the trainable parameters.

    Buffers are not averaged, and frozen parameters do not change.
    """

    def __init__(self, policy: nn.Module, decay: float) -> None:
        """Begin with the policy's weights."""
        self._decay = decay
        self._parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self._average = [parameter.detach().clone() for parameter in self._parameters]

    def begin(self) -> None:
        """Begin with the weights that the policy has now."""
        copy_each(self._average, [parameter.detach() for parameter in self._parameters])

    @torch.no_grad()
    def follow(self) -> None:
        """Take the policy's weights into account; called once an update."""
        for average, parameter in zip(self._average, self._parameters, strict=True):
            average.lerp_(parameter, 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the policy the averaged weights within a block, and its own back at the end, bit for bit."""
        own: list[Tensor] = [parameter.detach().clone() for parameter in self._parameters]
        copy_each(self._parameters, self._average)
        try:
            yield
        finally:
            copy_each(self._parameters, own)
