"""Measure a VLA of `base` size on a GPU: decisions, updates with and without its backbone, both modes.

Two pictures of 224 x 224, a state and an instruction for decisions and updates, which need no simulator; the toy seen
by a camera for both modes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import asdict

import torch

from asyncflow.config.presets import load_config
from asyncflow.config.sections import Config
from asyncflow.profile.leg import change
from asyncflow.profile.measure import ProfileOptions
from asyncflow.simulators.spec import EnvSpec
from tools.bench.common.report import REPORTED, Finding
from tools.bench.policies.frozen import VARIANTS, extent_of, measure_updates
from tools.bench.policies.inference import BATCHES, measure_decisions
from tools.bench.policies.judge import judge_frozen, measured_flops, median_s
from tools.bench.policies.page import UPDATES, describe_spread
from tools.bench.policies.parts import shape_of_preset
from tools.bench.policies.settings import BASE_ON_GPU, PRESET, TINY_RUN, load
from tools.gpu_check.runs import Scale
from tools.gpu_check.speed import Tables, profile_policy

CAMERAS = ("agentview", "robot0_eye_in_hand")
NUM_DECISIONS, NUM_UPDATES = 100, 5
FREEZE = "policy.freeze_backbone"
BACKBONES = {"trained backbone": {FREEZE: False}, "frozen backbone": {FREEZE: True}}

_RUN = {
    "trainer.eval_interval": 0,
    "trainer.save_interval": 1000,
    "trainer.total_updates": 1000,
    "logging.logger": "none",
}
_RUN_FULL = {
    "policy.vla.size": "base",
    "policy.vla.patch_size": 2,
    "policy.vla.dtype": "bfloat16",
    "policy.vla.feature_dtype": "bfloat16",
    "env.num_envs": 16,
}
_RUN_QUICK = {"env.num_envs": 4, "buffer.buffer_size": 32}


def check_vla(scale: Scale, tables: Tables) -> Iterator[Finding]:
    """Time decisions and updates, judge what a frozen backbone saves, and profile both modes."""
    config, spec = _config(scale), _spec(scale)
    size = config.policy.vla.size
    yield from _check_decisions(scale, config, spec)
    yield from _check_updates(scale, config, spec)
    for backbone, keys in BACKBONES.items():
        run = _RUN | (_RUN_QUICK if scale.is_quick else _RUN_FULL) | keys | {"trainer.device": str(scale.device)}
        title = f"{size} VLA, {backbone}, toy seen by a camera"
        yield profile_policy(scale, title, load_config("toy_vla_tiny", run), ProfileOptions(), tables)


def _config(scale: Scale) -> Config:
    quick = TINY_RUN if scale.is_quick else ()
    return load(PRESET, (*BASE_ON_GPU, *quick, f"trainer.device={scale.device}"))


def _spec(scale: Scale) -> EnvSpec:
    side = 84 if scale.is_quick else 224
    images = {f"images.{camera}": (3, side, side) for camera in CAMERAS}
    return EnvSpec({"state": (9,), **images}, action_dim=7, horizon=120)


def _check_decisions(scale: Scale, config: Config, spec: EnvSpec) -> Iterator[Finding]:
    num_decisions = 6 if scale.is_quick else NUM_DECISIONS
    for backbone, keys in BACKBONES.items():
        for num_envs in BATCHES:
            for row in measure_decisions(change(config, keys), spec, num_envs, num_decisions):
                built = "" if row["build_s"] is None else f"; built in {row['build_s']:.1f} s"
                title = f"{config.policy.vla.size} VLA, {backbone}, policy.compile={row['mode']}"
                shown = f"{describe_spread(row)} ms, median and deciles{built}"
                yield Finding(f"{title}: a decision of {num_envs} environments", shown, REPORTED, True)
            _free(scale)


def _check_updates(scale: Scale, config: Config, spec: EnvSpec) -> Iterator[Finding]:
    updates = {}
    for variant in VARIANTS:
        updates[variant] = measure_updates(config, spec, variant, 1 if scale.is_quick else NUM_UPDATES)
        _free(scale)
    figures = {"updates": updates, "preset": asdict(extent_of(shape_of_preset(config), spec.horizon))}
    for variant in VARIANTS:
        shown = f"{median_s(figures, variant):.3f} s, {measured_flops(figures, variant) / 1e9:,.1f} GFLOP"
        yield Finding(f"{config.policy.vla.size} VLA, an update, {UPDATES[variant]}", shown, REPORTED, True)
    yield from judge_frozen(figures, is_judged=not scale.is_quick)


def _free(scale: Scale) -> None:
    """Give memory back before the next policy of this size is built."""
    gc.collect()
    if scale.device.type == "cuda":
        torch.cuda.empty_cache()
