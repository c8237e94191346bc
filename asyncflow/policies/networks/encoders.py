"""From an observation to what actor and critic see: the normalised state and what cameras yield, as features.

A new kind is an encoder in a module of its own and an entry of `ENCODERS`.

Shapes: N observations, O env steps of a history (n_obs_steps), D size of the state, F features of an observation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from asyncflow.config.observations import IMAGES, POINTS, STATE, TASK, Shapes
from asyncflow.config.sections import PolicyConfig
from asyncflow.policies.networks.image_encoder import ImageEncoder
from asyncflow.policies.networks.layers import Normalizer
from asyncflow.policies.networks.point_encoder import PointEncoder
from asyncflow.simulators.spec import EnvSpec


class EncoderEntry(NamedTuple):
    """The encoder of one kind: the policy's attribute, which names its weights in files, and its builder.

    What is built is called with camera -> tensor [N, ...], returns features [N, F], and says F as `num_features`.
    """

    attribute: str
    build: Callable[[PolicyConfig, Shapes], nn.Module]


ENCODERS = {
    IMAGES: EncoderEntry("image_encoder", lambda config, shapes: ImageEncoder(config.image_encoder, shapes)),
    POINTS: EncoderEntry("point_encoder", lambda _, shapes: PointEncoder(shapes)),
}


class TaskEncoder(nn.Module):
    """Tells several tasks apart, for a policy that reads no instruction."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.num_features = num_tasks

    def forward(self, task: Tensor) -> Tensor:
        """Return a number for each task, `[N, F]`: 1 for that of an observation, `[N]`, else 0."""
        return (task[:, None] == torch.arange(self.num_features, device=task.device)).float()


def add_encoders(policy: nn.Module, config: PolicyConfig, spec: EnvSpec) -> int:
    """Give a policy `obs_normalizer` and an encoder of each kind in the spec; return the size of what `encode` returns.

    Raises:
        ConfigError: What cameras yield cannot be encoded as configured.
    """
    policy.register_module("obs_normalizer", Normalizer(spec.state_shape[-1:]))
    tasks = TaskEncoder(len(spec.task_table)) if TASK in spec.obs else None
    policy.register_module("task_encoder", tasks)
    size = prod(spec.state_shape) + (0 if tasks is None else tasks.num_features)
    for kind, entry in ENCODERS.items():
        shapes = spec.shapes(kind)
        encoder = entry.build(config, shapes) if shapes else None
        policy.register_module(entry.attribute, encoder)
        size += 0 if encoder is None else int(encoder.num_features)  # type: ignore[arg-type]
    return size


def find_encoders(policy: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (kind, encoder) of a policy's encoders."""
    for kind, entry in ENCODERS.items():
        encoder = getattr(policy, entry.attribute, None)
        if encoder is not None:
            yield kind, encoder


def encode(policy: nn.Module, obs: TensorDictBase) -> Tensor:
    """Return the normalised state and the features that a policy's encoders see, [N, O * D + F].

    With several tasks, F counts those of `TaskEncoder`, too.
    """
    normalizer: Normalizer = policy.obs_normalizer  # type: ignore[assignment]
    state = normalizer.normalize(obs[STATE]).flatten(1)
    features = [encoder(obs[kind]) for kind, encoder in find_encoders(policy)]
    tasks: TaskEncoder | None = policy.task_encoder  # type: ignore[assignment]
    if tasks is not None:
        features.append(tasks(obs[TASK]))
    return torch.cat([state, *features], 1) if features else state
