"""A LeRobot policy folder as a policy, and back.

The policy takes the units of its actions from the folder, and its checkpoints hold a folder for LeRobot. This file
loads LeRobot, an optional extra: only `make_policy` imports it, once a folder asks for it. The models themselves are in
`smolvla.py` and `pi0.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from asyncflow.config.lerobot_folder import EXPORT, LeRobotFolder
from asyncflow.config.observations import Shapes
from asyncflow.config.sections import PolicyConfig
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.policies.lerobot.model import LeRobotModel, one_line
from asyncflow.policies.vla.policy import VLAPolicy


class LeRobotPolicy(VLAPolicy):
    """A `VLAPolicy` in the units of a LeRobot folder, which its checkpoints hold one of."""

    def __init__(self, config: PolicyConfig, model: LeRobotModel) -> None:
        """Wrap a model.

        Raises:
            ConfigError: An impossible combination of noise keys.
        """
        offset, scale = model.action_range()
        super().__init__(config, model, len(offset))
        self.action_normalizer.offset.copy_(offset)
        self.action_normalizer.scale.copy_(scale)

    def export(self, folder: Path) -> None:
        """Write the folder `lerobot`, which LeRobot loads again and denoises and executes as it was trained to.

        The value head is not in it.
        """
        self.model.save_folder(folder / EXPORT, len(self.sampler.time), self.n_action_steps)


def build_lerobot(
    config: PolicyConfig,
    folder: LeRobotFolder,
    cameras: Mapping[str, str],
    image_shapes: Shapes,
    instructions: Sequence[str],
) -> LeRobotPolicy:
    """Return the policy of a LeRobot folder.

    Args:
        config: The policy's keys.
        folder: What to read.
        cameras: LeRobot's name of a picture -> its name in an observation.
        image_shapes: Name in an observation -> `(3, height, width)`.
        instructions: Of each task, which an observation's `task` is the index of; or one for all observations.

    Raises:
        CheckpointError: Its model cannot be built, or its tensors do not fit it.
        ConfigError: An impossible combination of keys.
    """
    if config.vla.lora_rank:
        raise ConfigError(
            f"policy.vla.lora_rank = {config.vla.lora_rank}: a LeRobot folder has no place for adapters; use 0, and "
            "policy.freeze_backbone or the folder's train_expert_only to train less"
        )
    model = _model_class(folder.type)(folder, cameras, config, instructions)
    try:
        model.look_at_black(image_shapes)
    except Exception as error:  # LeRobot builds models that its own code cannot run
        raise CheckpointError(
            f"policy.checkpoint = {folder.path}: its model cannot decide on such observations: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
    return LeRobotPolicy(config, model)


def _model_class(kind: str) -> Callable[[LeRobotFolder, Mapping[str, str], PolicyConfig, Sequence[str]], LeRobotModel]:
    """Return what reads folders of a type; each loads much of transformers that the others do not need."""
    if kind == "pi0":
        from asyncflow.policies.lerobot.pi0 import Pi0  # noqa: PLC0415

        return Pi0
    from asyncflow.policies.lerobot.smolvla import SmolVLA  # noqa: PLC0415

    return SmolVLA
