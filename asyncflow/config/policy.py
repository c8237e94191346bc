"""The configuration's part about policies, and what all of its sections have in common.

Names, defaults, meanings and limits stand here, as in `sections`, from which the rest of the package takes them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from asyncflow.config.plugins import POLICIES, plugin_names

POLICY_KINDS = ("flow", "gaussian", "vla", "lerobot")
MAX_VALUES = 10_000  # of policy.vla.model_config; in YAML a value can hold itself
CompileMode = Literal["none", "compile", "graph"]


PathText = Annotated[str, AfterValidator(os.path.expanduser)]  # of what a shell leaves as it is, such as out=~/run


MAX_COUNT, MAX_NUMBER = 2**63 - 1, 1e30  # of a 64-bit integer; float32 can still multiply what is around 1 by it
MAX_SECONDS = 1e6  # eleven days; the system's clocks count milliseconds in 32 bits


class Section(BaseModel):
    """A group of keys: unknown keys are errors, values are never coerced across types, instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _check_numbers(cls, value: Any) -> Any:
        """Refuse numbers beyond what the types hold that compute with them."""
        for number in value if isinstance(value, list) else [value]:
            limit = MAX_COUNT if isinstance(number, int) else MAX_NUMBER
            if isinstance(number, int | float) and abs(number) > limit:
                raise PydanticCustomError("too_large", "input should be at most {limit}", {"limit": limit})
        return value

    @field_validator("*")
    @classmethod
    def _check_text(cls, value: Any) -> Any:
        for text in _texts(value):
            if "\0" in text or (not text.isascii() and any("\ud800" <= each <= "\udfff" for each in text)):
                raise PydanticCustomError("unwritable", "Must be text in UTF-8 without the character 0")
        return value


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value, those in lists and mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for each in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _texts(each)


class VLAConfig(Section):
    """A vision-language-action model."""

    model_config = ConfigDict(protected_namespaces=(), populate_by_name=True)

    model_class: str | None = Field(
        None, description="Import path of a model from elsewhere, package.module.Class; null: asyncflow's own."
    )
    model_path: PathText | None = Field(
        None, description="Weights of model_class: a state dict, or for from_pretrained."
    )
    model_kwargs: dict[str, Any] = Field(
        {}, alias="model_config", description="Arguments with which model_class is built."
    )
    size: Literal["tiny", "base"] = Field("tiny", description="tiny: tests, on a CPU; base: 0.5 B parameters, one GPU.")
    instruction: str = Field("", description="What the robot is told to do; at most 127 bytes.")
    patch_size: int = Field(14, ge=1, description="Side of a vision token's square in pictures, pixels.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="What the networks compute in; trained weights, log-probs and values stay float32."
    )
    feature_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="What a frozen backbone's features are kept in, in the ring."
    )
    lora_rank: int = Field(0, ge=0, description="Rank of the backbone's LoRA adapters; 0: none, train it whole.")
    lora_alpha: float | None = Field(None, gt=0, description="LoRA's scale times its rank; null means the rank.")
    lora_targets: list[str] | None = Field(
        None, description="Layers of the backbone that get an adapter, as peft matches names; null: all linear ones."
    )

    @model_validator(mode="after")
    def _check_model_kwargs(self) -> VLAConfig:
        """Refuse what a policy file would not give back: it keeps them as JSON."""
        if problem := _find_other_than_json(self.model_kwargs, "policy.vla.model_config"):
            raise ValueError(
                f"{problem}: a checkpoint could not keep it; allowed are text, numbers, true, false, null, lists, and "
                "mappings whose keys are text"
            )
        return self


def _find_other_than_json(value: Any, place: str) -> str | None:
    """Return the first place in `value` that is not JSON, and what is there."""
    waiting = [(place, value)]
    for _ in range(MAX_VALUES):
        if not waiting:
            return None
        inside, each = waiting.pop()
        if isinstance(each, dict):
            if other := [key for key in each if not isinstance(key, str)]:
                return f"{inside}: key {other[0]!r}"
            waiting += [(f"{inside}.{key}", part) for key, part in each.items()]
        elif isinstance(each, list):
            waiting += [(f"{inside}[{index}]", part) for index, part in enumerate(each)]
        elif not isinstance(each, str | int | float | None) or (isinstance(each, float) and not math.isfinite(each)):
            return f"{inside} = {each!r}"
    return f"{place}: more than {MAX_VALUES} values, or a value that holds itself"


def _name_observation(name: str) -> str:
    return "object" if name == "object-state" else name


ObsKey = Annotated[str, AfterValidator(_name_observation)]  # robomimic's name; robosuite's own for one of them is taken


class StatePart(Section):
    """A piece of what the simulator observes, where it stands in the model's state."""

    key: ObsKey = Field(description="One of env.obs_keys; `state` where the environment has no names.")
    slice: list[int] | None = Field(
        None, min_length=2, max_length=2, description="Its first number and the one after its last; null: all of it."
    )

    @model_validator(mode="after")
    def _check_slice(self) -> StatePart:
        if self.slice is not None and not 0 <= self.slice[0] < self.slice[1]:
            raise ValueError(
                f"policy.mapping.obs.state: slice = {self.slice} of {self.key!r} must be [first, end], 0 <= first < end"
            )
        return self


class ObsMapping(Section):
    """Maps the simulator's observations to the model's."""

    images: dict[str, str] | None = Field(
        None, description="Image of env.cameras -> the model's name for it; null: all, under their own names."
    )
    state: list[StatePart] | None = Field(
        None, min_length=1, description="{key, slice} of what the model's state concatenates; null: env.obs_keys."
    )
    language: str = Field("", description="The instruction, in place of policy.vla.instruction.")

    @model_validator(mode="after")
    def _check_images(self) -> ObsMapping:
        names = list((self.images or {}).values())
        if not all(names) or len(set(names)) < len(names):
            raise ValueError(f"policy.mapping.obs.images = {self.images}: every image needs a name of its own")
        return self


class ActionMapping(Section):
    """Maps the model's actions to the simulator's: selected, scaled, offset; an entry per simulator dimension."""

    size: PositiveInt | None = Field(None, description="Size of the model's action; null: the simulator's.")
    select: list[NonNegativeInt] | None = Field(
        None, min_length=1, description="Dimensions of the model's action that the simulator executes; null: all."
    )
    scale: list[float] | None = Field(None, min_length=1, description="Factors; null: 1.")
    offset: list[float] | None = Field(None, min_length=1, description="What is added, after scaling; null: 0.")

    @model_validator(mode="after")
    def _check(self) -> ActionMapping:
        if self.select is None:
            if self.size is not None:
                raise ValueError(f"policy.mapping.action.size = {self.size} needs policy.mapping.action.select")
        elif max(self.select) >= (size := self.size or len(self.select)):
            raise ValueError(
                f"policy.mapping.action.select = {self.select}: the model's actions have {size} dimensions, counted "
                "from 0; see policy.mapping.action.size"
            )
        if 0 in (self.scale or []):
            raise ValueError(f"policy.mapping.action.scale = {self.scale}: a factor of 0 would execute nothing")
        return self


class MappingConfig(Section):
    """From a simulator's names and units to a model's."""

    obs: ObsMapping = ObsMapping()
    action: ActionMapping = ActionMapping()

    @property
    def parts(self) -> dict[str, Any]:
        """Return the parts of the mapping by key, without the instruction."""
        obs, action = self.obs.model_dump(exclude_none=True), self.action.model_dump(exclude_none=True)
        found = {f"policy.mapping.obs.{name}": obs[name] for name in ("images", "state") if name in obs}
        return found | ({"policy.mapping.action": action} if action else {})


class PolicyConfig(Section):
    """The network, its sampler and its log-probs."""

    kind: str = Field(
        "flow", description="flow, gaussian, vla, lerobot, or a name that an installed package registered."
    )
    checkpoint: PathText | None = Field(
        None,
        description="Weights to start from: a run, a checkpoint folder, a .safetensors file, `lift_flow`, or a policy "
        "folder of LeRobot, which sets kind to lerobot.",
    )
    statistics: str | None = Field(
        None, description="lerobot: whose statistics are used, where a folder holds those of several datasets."
    )
    hidden_sizes: list[PositiveInt] = Field([256, 256], min_length=1, description="Hidden layers of the actor.")
    critic_hidden_sizes: list[PositiveInt] = Field([256, 256], min_length=1, description="Hidden layers of the critic.")
    image_encoder: Literal["small", "resnet18"] = Field(
        "small", description="Network on every camera's images: two residual blocks, for a CPU, or eight."
    )
    horizon: int = Field(4, ge=1, description="Actions that one decision predicts, P.")
    n_action_steps: int = Field(4, ge=1, description="Actions of a chunk that are sent to the simulator, H.")
    num_inference_steps: int = Field(4, ge=1, le=1000, description="Denoising steps of the flow, K.")
    noise_method: Literal["flow_sde", "flow_noise", "flow_cps"] = Field(
        "flow_noise", description="How the flow's sampler becomes stochastic."
    )
    noise_level: float = Field(
        0.5, gt=0, description="flow_sde, flow_cps: the noise scale a; flow_noise with fixed noise: its std."
    )
    noise_level_final: float | None = Field(
        None, gt=0, description="Value that noise_level is annealed to; null: none."
    )
    anneal_updates: int = Field(0, ge=0, description="Updates over which noise_level is annealed linearly.")
    learn_noise: bool = Field(True, description="flow_noise: learn a std per action dimension within noise_range.")
    noise_range: list[float] = Field(
        [0.08, 0.16],
        min_length=2,
        max_length=2,
        description="flow_noise: bounds of the learned std of one step; tuned at K = 4.",
    )
    log_prob: Literal["joint_sum", "joint_mean", "per_step", "single_step"] = Field(
        "joint_mean",
        description="Log-prob of a decision: sum or mean over steps and dimensions (a mean tempers the ratio), "
        "one ratio per denoising step, or one random step per decision.",
    )
    min_std: float = Field(0.0, ge=0, description="Floor of every std; a learned one approaches it from above.")
    initial_std: float = Field(0.5, gt=0, description="gaussian: standard deviation before training.")
    compile: CompileMode = Field(
        "none", description="Inference while collecting: as it is, by torch.compile, or as a CUDA graph."
    )
    freeze_backbone: bool = Field(
        False, description="vla: train without the backbone; the ring keeps its features instead of observations."
    )
    vla: VLAConfig = Field(VLAConfig(), description="The model of kind vla.")
    mapping: MappingConfig = Field(MappingConfig(), description="From a simulator's names to a model's.")

    @property
    def has_model_class(self) -> bool:
        """Return whether the policy is a model named by `policy.vla.model_class`."""
        return self.kind == "vla" and self.vla.model_class is not None

    @property
    def is_from_elsewhere(self) -> bool:
        """Return whether the policy's code is neither asyncflow's nor LeRobot's."""
        return self.has_model_class or self.kind not in POLICY_KINDS

    @property
    def source(self) -> str:
        """The key that chose the policy's code, and its value, as an error message names it."""
        if self.has_model_class:
            return f"policy.vla.model_class = {self.vla.model_class}"
        return f"policy.kind = {self.kind}"

    @property
    def instruction(self) -> str:
        """The instruction that the model is given."""
        return self.mapping.obs.language or self.vla.instruction

    @property
    def executed_dims(self) -> list[int] | None:
        """The model's action dimensions that the simulator executes; None: all of them."""
        action = self.mapping.action
        executed = sorted(set(action.select or []))
        return executed if len(executed) < (action.size or len(action.select or [])) else None

    @model_validator(mode="after")
    def _check_kind(self) -> PolicyConfig:
        if self.kind not in POLICY_KINDS and self.kind not in plugin_names(POLICIES):
            known = ", ".join([*POLICY_KINDS, *plugin_names(POLICIES)])
            raise ValueError(
                f"policy.kind = {self.kind!r}: not known; allowed: {known}; an installed package adds names as "
                f"entry points of the group {POLICIES}"
            )
        return self

    @model_validator(mode="after")
    def _check_language(self) -> PolicyConfig:
        language, instruction = self.mapping.obs.language, self.vla.instruction
        if language and self.kind in ("flow", "gaussian"):
            raise ValueError(f"policy.mapping.obs.language = {language!r}: policy.kind = {self.kind} reads none")
        if language and instruction and language != instruction:
            raise ValueError(
                f"policy.mapping.obs.language = {language!r} and policy.vla.instruction = {instruction!r} differ; "
                "set one of them"
            )
        return self
