"""Every number of a run, as validated models.

Every key's name, default, meaning and limits stand here; `presets` reads values from files and command lines. It
imports neither torch nor a simulator, so that the command line can refuse a bad configuration before anything slow is
loaded. A key that nothing reads does not belong here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from asyncflow.config.algorithm import ADVANTAGE_NAMES, AlgorithmConfig, AuxiliaryConfig, Schedule
from asyncflow.config.observations import KINDS
from asyncflow.config.policy import (
    MAX_SECONDS,
    POLICY_KINDS,
    CompileMode,
    ObsKey,
    PathText,
    PolicyConfig,
    Section,
    VLAConfig,
)
from asyncflow.config.removed import show, take_removed
from asyncflow.config.suites import label, settle_tasks
from asyncflow.errors import ConfigError

__all__ = [
    "ADVANTAGE_NAMES",
    "MAX_SECONDS",
    "POLICY_KINDS",
    "AlgorithmConfig",
    "AuxiliaryConfig",
    "BufferConfig",
    "BufferType",
    "CollectorConfig",
    "CompileMode",
    "Config",
    "EnvConfig",
    "LoggingConfig",
    "PolicyConfig",
    "Schedule",
    "Section",
    "TrainerConfig",
    "VLAConfig",
    "describe_keys",
    "validate",
    "values_by_key",
]

BufferType = Literal["vla", "standard"]
MIN_PIXELS, MAX_PIXELS = 16, 1024  # less than an image encoder can take; more than a simulator's frame buffer


class EnvConfig(Section):
    """The task to simulate, and the number of processes."""

    task: str = Field("Lift", description="Task name (`asyncflow tasks` lists them); `Toy` needs no simulator.")
    tasks: list[str] = Field(
        [], description="Tasks and suites over which environments are spread, in place of task; empty: task alone."
    )
    env_meta: PathText | dict[str, Any] | None = Field(
        None,
        description="JSON file, robomimic dataset or checkpoint (.pth) whose `env_meta` replaces the task's own, or "
        "that `env_meta` itself; null means that of the policy to start from, else the task's own.",
    )
    num_envs: int = Field(16, ge=1, description="Environments collected from, N.")
    python: PathText | None = Field(
        None,
        description="Interpreter that simulates, the folder of its virtual environment, or a kind of `asyncflow envs`, "
        "such as robosuite14; null means the one that `asyncflow envs` remembers for the task, else this one. It needs "
        "Python 3.8 or newer, numpy and the simulator's packages, and neither torch nor asyncflow.",
    )
    num_workers: int | None = Field(None, ge=1, description="Simulator processes; null means one per CPU core.")
    horizon: int | None = Field(
        None,
        ge=1,
        description="Env steps until an episode is truncated; null means those of the policy, else the task's.",
    )
    obs_keys: list[ObsKey] | None = Field(
        None,
        min_length=1,
        description="Low-dimensional observations concatenated into `state`; null means those of the policy to start "
        "from, else the task's.",
    )
    n_obs_steps: int = Field(
        1, ge=1, description="Env steps that one observation shows, the last one and those before."
    )
    cameras: list[str] = Field([], description="Cameras that are rendered at a chunk's end; none by default.")
    camera_size: list[int] = Field(
        [84, 84], min_length=2, max_length=2, description="Pixels of what cameras render: height, width."
    )
    point_clouds: list[str] = Field(
        [], description="Cameras whose depth and colours become a point cloud at a chunk's end; none by default."
    )
    num_points: int = Field(1024, ge=1, le=65536, description="Points of a cloud.")
    point_bounds: list[float] = Field(
        [-0.5, -0.5, 0.805, 0.5, 0.5, 1.5],
        min_length=6,
        max_length=6,
        description="Box in the world whose points are kept, metres: low x, y, z, then high x, y, z.",
    )
    rotate_images: bool = Field(
        True, description="Turn LIBERO's images by 180 degrees: published policies were trained on them so."
    )
    num_steps_wait: int = Field(
        10, ge=0, le=1000, description="Env steps in which the things of a LIBERO task settle before an episode begins."
    )
    fast_step: bool = Field(True, description="Leave out what changes nothing in an OSC step; the same bits, sooner.")
    step_timeout_s: float = Field(
        120.0, gt=0, le=MAX_SECONDS, description="A worker silent for longer is killed and replaced."
    )
    max_restarts: int = Field(10, ge=0, description="Workers replaced within restart_window_s; one more ends the run.")
    restart_window_s: float = Field(600.0, gt=0, le=MAX_SECONDS, description="Seconds over which max_restarts counts.")

    @property
    def task_label(self) -> str:
        """The task's name, or what several are called together."""
        return label(self.tasks) if self.tasks else self.task

    def each_task(self) -> list[EnvConfig]:
        """Return these keys for each task alone."""
        return [self.model_copy(update={"task": name, "tasks": []}) for name in self.tasks] or [self]

    @property
    def env_meta_file(self) -> str | None:
        """The file that `env_meta` names; None where there is none."""
        return self.env_meta if isinstance(self.env_meta, str) else None

    @model_validator(mode="before")
    @classmethod
    def _expand_suites(cls, values: Any) -> Any:
        return settle_tasks(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_tasks(self) -> EnvConfig:
        if twice := [name for name in self.tasks if self.tasks.count(name) > 1]:
            raise ValueError(f"env.tasks = {self.tasks} names {twice[0]} twice")
        if self.tasks and self.env_meta is not None:
            raise ValueError(f"env.tasks = {self.tasks}: env.env_meta describes one task; leave it out")
        if len(self.tasks) > self.num_envs:
            raise ValueError(
                f"env.num_envs = {self.num_envs} must be at least {len(self.tasks)}, the number of tasks (env.tasks)"
            )
        return self

    @model_validator(mode="after")
    def _check_cameras(self) -> EnvConfig:
        for kind in KINDS.values():
            names = getattr(self, kind.key)
            if len(set(names)) < len(names):
                raise ValueError(f"env.{kind.key} = {names} names a camera twice")
        if not all(MIN_PIXELS <= size <= MAX_PIXELS for size in self.camera_size):
            raise ValueError(
                f"env.camera_size = {self.camera_size} must be two numbers from {MIN_PIXELS} to {MAX_PIXELS}"
            )
        low, high = self.point_bounds[:3], self.point_bounds[3:]
        if not all(a < b for a, b in zip(low, high, strict=True)):
            raise ValueError(f"env.point_bounds = {self.point_bounds} must be three numbers and three larger ones")
        return self


class BufferConfig(Section):
    """The ring of rollouts and how stale its data may be."""

    buffer_size: int = Field(960, ge=1, description="Decisions in a rollout, T * N.")
    max_policy_lag: int | None = Field(
        None, ge=0, le=4, description="Lag limit L in updates; null means 1 in asynchronous mode, 0 in synchronous."
    )
    lag_mode: Literal["fixed", "bounded"] = Field(
        "fixed", description="fixed: rollout n acts with version max(0, n - L); bounded: with the newest published."
    )
    on_full: Literal["block", "overwrite"] = Field(
        "block", description="Collector without a free slot waits, or recycles the oldest finished rollout."
    )


class CollectorConfig(Section):
    """Settings of the collector: how environments are stepped."""

    num_env_groups: int = Field(1, ge=1, description="Groups of environments stepped while others infer, G.")


class TrainerConfig(Section):
    """The loop: mode, seed, device, length, intervals."""

    buffer_type: BufferType = Field(
        "vla", description="vla, asynchronous: a collector thread; standard, synchronous: collect, then train."
    )
    seed: int = Field(0, ge=0, description="Seed of the whole run.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    num_threads: int = Field(1, ge=1, le=1024, description="CPU threads of one torch operation.")
    total_updates: int | None = Field(20, ge=1, description="Updates to train; null: no limit.")
    total_env_steps: int | None = Field(None, ge=1, description="Env steps to train on; null: no limit.")
    save_interval: int = Field(10, ge=1, description="Updates between checkpoints.")
    keep_last: int | None = Field(
        5, ge=2, description="Newest checkpoints that are kept, besides the best one; null keeps all."
    )
    eval_interval: int = Field(10, ge=0, description="Updates between evaluations; 0: none.")
    eval_episodes: int = Field(50, ge=1, description="Episodes of an evaluation.")

    @model_validator(mode="after")
    def _check_end(self) -> TrainerConfig:
        if self.total_updates is None and self.total_env_steps is None:
            raise ValueError("trainer.total_updates and trainer.total_env_steps are both null; set one of them")
        return self


class LoggingConfig(Section):
    """Settings of a run's files."""

    out: PathText | None = Field(
        None, description="Run folder; null means runs/<task>_<buffer type>_seed<seed>_<time>."
    )
    logger: Literal["tensorboard", "none"] = Field("tensorboard", description="Curves beside metrics.jsonl.")
    trace: bool = Field(False, description="Write trace.json: who did what when, for Perfetto or chrome://tracing.")


class Config(Section):
    """A whole run. `presets.load_config` builds one; its properties follow from the others."""

    env: EnvConfig = EnvConfig()
    policy: PolicyConfig = PolicyConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    buffer: BufferConfig = BufferConfig()
    collector: CollectorConfig = CollectorConfig()
    trainer: TrainerConfig = TrainerConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def num_steps(self) -> int:
        """Decisions of each environment in a rollout, T."""
        return self.buffer.buffer_size // self.env.num_envs

    @property
    def max_policy_lag(self) -> int:
        """Lag limit L, in updates."""
        if self.buffer.max_policy_lag is not None:
            return self.buffer.max_policy_lag
        return 1 if self.trainer.buffer_type == "vla" else 0

    @model_validator(mode="after")
    def _check_combinations(self) -> Config:
        size, envs = self.buffer.buffer_size, self.env.num_envs
        _require_multiple("buffer.buffer_size", size, "env.num_envs", envs)
        _require_multiple("buffer.buffer_size", size, "algorithm.num_minibatches", self.algorithm.num_minibatches)
        _require_multiple("env.num_envs", envs, "collector.num_env_groups", self.collector.num_env_groups)
        if self.policy.n_action_steps > self.policy.horizon:
            raise ValueError(
                f"policy.n_action_steps = {self.policy.n_action_steps} must be at most "
                f"policy.horizon = {self.policy.horizon}"
            )
        if self.policy.freeze_backbone and self.policy.kind in ("flow", "gaussian"):
            raise ValueError(
                f"policy.freeze_backbone = true: policy.kind = {self.policy.kind} has no backbone; use vla"
            )
        if self.policy.freeze_backbone and self.policy.vla.lora_rank:
            raise ValueError(
                f"policy.freeze_backbone = true with policy.vla.lora_rank = {self.policy.vla.lora_rank}: adapters "
                "train the backbone; set one of them"
            )
        low, high = self.policy.noise_range
        if not 0 < low < high:
            raise ValueError(f"policy.noise_range = {[low, high]} must be two positive, rising numbers")
        if self.algorithm.success_value == "continue" and self.algorithm.gamma == 1:
            raise ValueError(
                "algorithm.success_value = continue needs algorithm.gamma below 1: a reward for ever has no other value"
            )
        if self.buffer.on_full == "overwrite" and self.buffer.lag_mode == "fixed":
            raise ValueError("buffer.on_full = overwrite needs buffer.lag_mode = bounded: fixed lag loses no rollout")
        _check_algorithm(self)
        if self.trainer.eval_interval and self.trainer.eval_episodes < len(self.env.tasks):
            raise ValueError(
                f"trainer.eval_episodes = {self.trainer.eval_episodes} must be at least {len(self.env.tasks)}, one for "
                "each of env.tasks"
            )
        if self.buffer.on_full == "overwrite" and self.trainer.buffer_type == "standard":
            raise ValueError("buffer.on_full = overwrite needs --buffer-type vla: a synchronous run never waits")
        return self


def _check_algorithm(config: Config) -> None:
    algorithm, total = config.algorithm, config.trainer.total_updates
    scheduled = {"algorithm.lr_schedule": algorithm.lr_schedule}
    for index, each in enumerate(algorithm.auxiliary):
        if each.schedule_updates is None:
            scheduled[f"algorithm.auxiliary[{index}].schedule"] = each.schedule
    for key, schedule in scheduled.items():
        if schedule != "constant" and total is None:
            raise ValueError(f"{key} = {schedule} needs trainer.total_updates, over which it falls")
    if algorithm.lr_schedule != "constant" and total is not None and algorithm.lr_warmup_updates >= total:
        raise ValueError(
            f"algorithm.lr_warmup_updates = {algorithm.lr_warmup_updates} must be below trainer.total_updates = {total}"
        )
    if algorithm.has_denoising_schedule and config.policy.log_prob not in ("per_step", "single_step"):
        raise ValueError(
            "algorithm.clip_coef_base and algorithm.denoising_discount need policy.log_prob = per_step or single_step, "
            f"not {config.policy.log_prob}: they treat every denoising step differently"
        )


def _require_multiple(key: str, value: int, divisor_key: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{key} = {value} must be a multiple of {divisor_key} = {divisor}")


def validate(values: dict[str, Any]) -> Config:
    """Validate nested values, as a preset or a run's `config.yaml` holds them.

    Raises:
        ConfigError: As `load_config`.
    """
    values, told = take_removed(values)
    if told:
        raise ConfigError(told[0])
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def describe_keys() -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, default, meaning) of every key."""
    return _describe("", Config())


def values_by_key(config: Config) -> dict[str, Any]:
    """Return the value of every key, by its dotted name."""
    return {key: value for key, value, _ in _describe("", config)}


def _describe(prefix: str, section: Section) -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, value, meaning) of every key of a section and of the sections within it."""
    for name, info in type(section).model_fields.items():
        key, value = f"{prefix}{info.alias or name}", getattr(section, name)
        if isinstance(value, Section):
            yield from _describe(f"{key}.", value)
        else:
            yield key, _plain(value), info.description or ""


def _plain(value: Any) -> Any:
    """Return a value as a preset holds it."""
    if isinstance(value, list):
        return [each.model_dump(exclude_none=True) if isinstance(each, Section) else each for each in value]
    return value


def explain(error: ValidationError) -> str:
    """Return one line about the first problem: key, value, what is allowed, nearest right name."""
    problem = error.errors()[0]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).removeprefix(".")
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{_suggest(key)}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{key} = {show(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _suggest(key: str) -> str:
    known = [name for name, *_ in describe_keys()] + list(Config.model_fields)
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in known}
    leaf = key.rsplit(".", 1)[-1]
    near = by_leaf.get(leaf) or nearest(key, known) or by_leaf.get(nearest(leaf, by_leaf) or "")
    return f"; did you mean {near}?" if near else f"; sections: {', '.join(Config.model_fields)}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return which name was meant: the shortest one that begins so, or else the most similar, if one is."""
    names = sorted(known, key=len)
    begun = [each for each in names if name and each.startswith(name)]
    near = begun or difflib.get_close_matches(name, names, n=1)
    return near[0] if near else None
