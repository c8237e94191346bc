"""The parts of `tools.bench.policies`: what is called with which policy, each in a process of its own.

Owns the order within a part, and what its record holds. It must not know what follows from the figures.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from asyncflow.config.sections import Config
from asyncflow.errors import ConfigError
from asyncflow.profile.leg import change
from asyncflow.simulators.spec import EnvSpec
from tools.bench.common.records import MeasurePart, Place
from tools.bench.common.report import isolated, run_profile
from tools.bench.policies.frozen import VARIANTS, extent_of, measure_updates, plan_bytes
from tools.bench.policies.inference import BATCHES, find_spec, measure_decisions
from tools.bench.policies.settings import PRESET, SIZES, SUBJECTS, Settings, load

NUM_SLOTS = 2  # of `vla` with its default lag
KEPT_AS: dict[str, dict[str, Any]] = {  # what the ring keeps of observations
    "pictures": {"policy.freeze_backbone": False},
    "features, float32": {"policy.freeze_backbone": True, "policy.vla.feature_dtype": "float32"},
    "features, bfloat16": {"policy.freeze_backbone": True, "policy.vla.feature_dtype": "bfloat16"},
}


def profile_subject(subject: str, settings: Settings, place: Place) -> dict[str, Any]:
    """Profile both modes of a run with a policy."""
    preset, overrides = settings.arguments(subject)
    arguments = ["--config", preset, *settings.profile_arguments, *overrides]
    return run_profile(arguments, place.out / f"profile_{subject}")


def time_subject(subject: str, settings: Settings, place: Place) -> dict[str, Any]:
    """Time a policy's decisions, of many environments at once and of one."""
    config = load(*settings.arguments(subject))
    spec = isolated(find_spec, config)
    rows: list[dict[str, Any]] = []
    for num_envs in BATCHES:
        rows += isolated(measure_decisions, config, spec, num_envs, settings.num_decisions)
        print(f"{subject}, {num_envs} at once: {rows[-1]['mode']} {1000 * rows[-1]['median_s']:.2f} ms", flush=True)
    return {"decisions": rows}


def compare_backbones(size: str, settings: Settings, place: Place) -> dict[str, Any]:
    """Time and count updates of a VLA, and plan its ring, for each way to treat its backbone.

    Raises:
        SystemExit: It does not fit into memory.
    """
    config = load(*settings.frozen_arguments(size))
    spec = isolated(find_spec, config)
    updates = {}
    for variant in VARIANTS:
        try:
            updates[variant] = isolated(measure_updates, config, spec, variant, dict(settings.num_updates)[size])
        except ConfigError as error:
            raise SystemExit(f"frozen_{size}: {error}") from None
        print(f"{size}, {variant}: {min(updates[variant]['seconds']):.3f} s", flush=True)
    shape = shape_of_preset(config)
    preset = asdict(extent_of(shape, spec.horizon))
    return {"updates": updates, "preset": preset, "ring": plan_rings(shape, spec)}


def shape_of_preset(config: Config) -> Config:
    """Return a configuration with the rollouts, environments and epochs of the preset."""
    preset = load(PRESET, ())
    return change(
        config,
        {
            "env.num_envs": preset.env.num_envs,
            "buffer.buffer_size": preset.buffer.buffer_size,
            "algorithm.num_minibatches": preset.algorithm.num_minibatches,
            "algorithm.update_epochs": preset.algorithm.update_epochs,
        },
    )


def plan_rings(config: Config, spec: EnvSpec) -> dict[str, dict[str, int]]:
    """Return the bytes of an observation and of the ring, by what is kept of observations."""
    configs = {kept: change(config, keys) for kept, keys in KEPT_AS.items()}
    return {kept: isolated(plan_bytes, config, spec, NUM_SLOTS) for kept, config in configs.items()}


PARTS: dict[str, MeasurePart] = {  # in the order in which they are measured
    **{f"profile_{subject}": partial(profile_subject, subject) for subject in SUBJECTS},
    **{f"inference_{subject}": partial(time_subject, subject) for subject in SUBJECTS},
    **{f"frozen_{size}": partial(compare_backbones, size) for size in SIZES},
}
