"""Torch's kernels for whole lists of tensors, and plain torch for where they are missing.

They have no public name in torch, so that nothing else in asyncflow calls them. A network of a dozen small tensors
takes them once instead of a dozen times, which makes an update of small policies a tenth faster; every function
computes the same without them, Adam up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HAS_KERNELS = all(
    hasattr(torch, name)
    for name in ("_foreach_add_", "_foreach_copy_", "_foreach_mul_", "_foreach_norm", "_fused_adam_")
)


@torch.no_grad()
def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy every source into its target, in place."""
    if HAS_KERNELS:
        torch._foreach_copy_(list(targets), list(sources))
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


@torch.no_grad()
def scale_each(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply every tensor by `factor`, [], in place; reads nothing back from the device."""
    if HAS_KERNELS:
        torch._foreach_mul_(list(tensors), factor)
        return
    for tensor in tensors:
        tensor.mul_(factor)


@torch.no_grad()
def norm_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the Euclidean norm, [], of every tensor."""
    if HAS_KERNELS:
        return list(torch._foreach_norm(list(tensors)))
    return [torch.linalg.vector_norm(tensor) for tensor in tensors]


class AdamTensors(NamedTuple):
    """The tensors that a step of Adam reads and writes: one entry per parameter, all of one type.

    Attributes:
        parameters: Changed in place.
        gradients: Only read.
        averages: Running means of the gradients.
        squares: Running means of their squares.
        steps: How many steps each parameter has taken, [] float32.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]


@torch.no_grad()
def adam_step_each(
    tensors: AdamTensors, is_taken: Tensor, *, lr: float, betas: tuple[float, float], eps: float
) -> None:
    """Take a step of Adam (Kingma and Ba, arXiv:1412.6980, algorithm 1), in place, if `is_taken`, [] bool.

    `is_taken` stays on the device, and nothing is read back; without a step nothing changes.

    Args:
        tensors: What it reads and writes.
        is_taken: Whether there is a step.
        lr: Step size.
        betas: How much of the two running means each step keeps.
        eps: What is added to the denominator.
    """
    taken, (beta, beta2) = is_taken.float(), betas
    if HAS_KERNELS:
        torch._foreach_add_(tensors.steps, [taken] * len(tensors.steps))  # a lone tensor would be read
        torch._fused_adam_(
            tensors.parameters,
            tensors.gradients,
            tensors.averages,
            tensors.squares,
            [],
            tensors.steps,
            lr=lr,
            beta1=beta,
            beta2=beta2,
            weight_decay=0.0,
            eps=eps,
            amsgrad=False,
            maximize=False,
            found_inf=1 - taken,  # with which the kernel does nothing, as for torch's own GradScaler
        )
        return
    for parameter, gradient, average, square, step in zip(*tensors, strict=True):
        step.add_(taken)
        new_average = average.lerp(gradient, 1 - beta)
        new_square = square * beta2 + gradient * gradient * (1 - beta2)
        denominator = (new_square / (1 - beta2**step)).sqrt() + eps
        new_parameter = parameter - lr / (1 - beta**step) * new_average / denominator
        for old, new in ((average, new_average), (square, new_square), (parameter, new_parameter)):
            old.copy_(torch.where(is_taken, new, old))
