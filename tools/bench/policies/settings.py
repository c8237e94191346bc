"""The settings of `tools.bench.policies`: the policies, how long each is measured, and on what a part depends.

Owns the subjects and the settings. It must not know how anything is measured.

A part is called `profile_<subject>`, `inference_<subject>` or `frozen_<size>`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from asyncflow.config.presets import load_config, parse_overrides
from asyncflow.config.sections import Config
from tools.bench.common.records import PartSettings
from tools.bench.common.report import count_cores

NAME = "policies"
CPU = "cpu"
PRESET = "lift_image"  # whose shape updates and rings are compared in
VLA = ("policy.checkpoint=null", "policy.kind=vla", "policy.vla.instruction=lift the cube")
TINY_VLA = (*VLA, "policy.vla.size=tiny", "buffer.buffer_size=160")
BASE_VLA = (
    *VLA, "policy.vla.size=base", "env.cameras=[agentview,robot0_eye_in_hand]", "env.camera_size=[224,224]",
)  # fmt: skip
BASE_ON_GPU = (
    *BASE_VLA, "policy.vla.dtype=bfloat16", "policy.vla.feature_dtype=bfloat16", "buffer.buffer_size=320",
    "algorithm.num_minibatches=10",
)  # fmt: skip
BASE_ON_CPU = (  # a few decisions of it: seconds of the smallest update, not a run
    *BASE_VLA, "env.num_envs=1", "buffer.buffer_size=4", "algorithm.num_minibatches=2", "algorithm.update_epochs=1",
    f"trainer.num_threads={count_cores()}",
)  # fmt: skip
FROZEN = "policy.freeze_backbone=true"
TINY_RUN = (
    "env.cameras=[]", "env.obs_keys=null", "env.num_envs=4", "policy.checkpoint=null", "policy.vla.size=tiny",
    "buffer.buffer_size=16", "algorithm.num_minibatches=2", "algorithm.update_epochs=1", "trainer.num_threads=1",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A policy that is measured, as arguments of the command line would have it.

    Attributes:
        title: What the page calls it.
        preset: What it begins with.
        overrides: What differs from the preset.
        tiny_task: What stands in for its task in a tiny call, and needs no simulator.
        needs_gpu: Whether a processor would take too long.
    """

    title: str
    preset: str = PRESET
    overrides: tuple[str, ...] = ()
    tiny_task: str = "ToyImages"
    needs_gpu: bool = False


SUBJECTS = {  # in the order in which they are measured
    "mlp": Subject("MLP", "lift", ("buffer.buffer_size=480",), tiny_task="Toy"),
    "image": Subject("image encoder", overrides=("policy.checkpoint=null", "buffer.buffer_size=160")),
    "tiny": Subject("`tiny` VLA", overrides=TINY_VLA),
    "tiny_frozen": Subject("`tiny` VLA, frozen backbone", overrides=(*TINY_VLA, FROZEN)),
    "base": Subject("`base` VLA", overrides=BASE_ON_GPU, needs_gpu=True),
    "base_frozen": Subject("`base` VLA, frozen backbone", overrides=(*BASE_ON_GPU, FROZEN), needs_gpu=True),
}
SIZES = ("tiny", "base")


@dataclass(frozen=True)
class Settings(PartSettings):
    """How long and how much is measured.

    Attributes:
        device: Of every policy: `cpu`, or the GPU's name.
        is_tiny: Whether small runs of the toys stand in for everything.
        profile_arguments: For every `asyncflow profile`; none means its defaults.
        num_decisions: Of each way to infer, in two halves.
        num_updates: Timed updates of each size of the VLA, of each way to treat its backbone.
    """

    device: str
    is_tiny: bool = False
    profile_arguments: tuple[str, ...] = ()
    num_decisions: int = 200
    num_updates: tuple[tuple[str, int], ...] = (("tiny", 5), ("base", 1))

    DEPENDS: ClassVar = {  # by the kind of a part; its policy comes on top
        "profile": ("device", "is_tiny", "profile_arguments"),
        "inference": ("device", "is_tiny", "num_decisions"),
        "frozen": ("device", "is_tiny", "num_updates"),
    }

    @property
    def has_gpu(self) -> bool:
        """Whether policies run on a GPU."""
        return self.device != CPU

    def of(self, part: str) -> dict[str, Any]:
        """Return what a part depends on, as a file holds it."""
        kind, _, name = part.partition("_")
        preset, overrides = self.frozen_arguments(name) if kind == "frozen" else self.arguments(name)
        return super().of(kind) | {"preset": preset, "overrides": list(overrides)}

    def can_measure(self, part: str) -> bool:
        """Tell whether a part can be measured on this device."""
        kind, _, name = part.partition("_")
        return kind == "frozen" or self.has_gpu or not SUBJECTS[name].needs_gpu

    def arguments(self, subject: str) -> tuple[str, tuple[str, ...]]:
        """Return preset and overrides of a subject."""
        chosen = SUBJECTS[subject]
        tiny = (*TINY_RUN, f"env.task={chosen.tiny_task}") if self.is_tiny else ()
        return chosen.preset, (*chosen.overrides, *tiny)

    def frozen_arguments(self, size: str) -> tuple[str, tuple[str, ...]]:
        """Return preset and overrides of the updates that a size of the VLA is measured by."""
        if size == "base" and not self.has_gpu:
            tiny = (*TINY_RUN, "env.task=ToyImages") if self.is_tiny else ()
            return PRESET, (*BASE_ON_CPU, *tiny)
        return self.arguments(size)


def load(preset: str, overrides: tuple[str, ...]) -> Config:
    """Return the configuration that a command line means."""
    return load_config(preset, parse_overrides(list(overrides)))


def choose_settings(device: str, is_tiny: bool) -> Settings:
    """Return how to measure on a device."""
    full = Settings(device)
    if not is_tiny:
        return full
    return replace(
        full,
        is_tiny=True,
        profile_arguments=("--num-repeats", "1", "--num-updates", "1"),
        num_decisions=6,
        num_updates=(("tiny", 2), ("base", 1)),
    )
