"""The parts that `asyncflow profile` measures, and how long emulated stages have to be for them.

Owns the commands. It must not know what a profile's figures are compared with.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from asyncflow.profile.leg import num_warmup, run_leg
from asyncflow.profile.measure import ProfileOptions, emulate
from asyncflow.profile.read import Window, stage_times
from tools.bench.common.records import Place, figures_of
from tools.bench.common.report import isolated, run_profile
from tools.bench.overlap.settings import Settings

TASKS = ("Toy", "Lift")


def time_alone(settings: Settings, task: str) -> tuple[float, float]:
    """Return Tc and Tt of a synchronous run, in seconds: the emulated inference included, no emulated update."""
    options = ProfileOptions(inference_latency_s=settings.inference_s(task))
    config = settings.load(task)
    window = Window(num_warmup(config), settings.balance_updates)
    leg = run_leg(config, "standard", window, emulate(config, options))
    stages = stage_times([leg], [leg])
    return stages.collect_s, stages.update_s


def measure_balance(settings: Settings, place: Place) -> dict[str, Any]:
    """Find the update's emulated seconds with which training takes as long as collecting, on each task."""
    found = {}
    for task in TASKS:
        collect_s, update_s = isolated(time_alone, settings, task)
        latency_s = round(max(0.0, collect_s - update_s), 3)
        found[task] = {"collect_s": collect_s, "update_s": update_s, "update_latency_s": latency_s}
        print(f"{task}: Tc {collect_s:.3f} s, Tt {update_s:.3f} s, {latency_s:.3f} s are added to Tt", flush=True)
    return found


def balanced_arguments(settings: Settings, place: Place, task: str) -> list[str]:
    """Return the arguments with which collecting and training take equally long."""
    update_s = figures_of(place, "balance")[task]["update_latency_s"]
    latencies = ["--inference-latency-s", str(settings.inference_s(task)), "--update-latency-s", str(update_s)]
    return ["--task", task, *latencies]


def profile(part: str, arguments: Sequence[str], place: Place, settings: Settings) -> dict[str, Any]:
    """Run the command and keep its picture; return what it found and how it was called.

    Raises:
        SystemExit: It failed.
    """
    folder = place.out / f"profile_{part}"
    overrides = [each for each in arguments if not each.startswith("-") and "=" in each]
    flags = [each for each in arguments if each not in overrides]
    found = run_profile([*flags, *settings.profile_arguments, *overrides], folder)
    place.pages.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "profile.png", place.picture(part))
    return found


def profile_two_stages(settings: Settings, place: Place) -> dict[str, Any]:
    """Profile the toy where collecting and training take equally long."""
    return profile("two_stages", balanced_arguments(settings, place, "Toy"), place, settings)


def profile_three_stages(settings: Settings, place: Place) -> dict[str, Any]:
    """Profile the toy where simulators, policy and update take equally long, with two groups."""
    seconds = str(settings.three_stages_s)
    flags = [f"--{stage}-latency-s" for stage in ("env", "inference", "update")]
    latencies = [each for flag in flags for each in (flag, seconds)]
    return profile("three_stages", ["--task", "Toy", *latencies, "collector.num_env_groups=2"], place, settings)


def profile_sweep(settings: Settings, place: Place) -> dict[str, Any]:
    """Profile the toy at each ratio of training to collecting."""
    return profile("sweep", ["--task", "Toy", "--sweep", "--num-repeats", str(settings.sweep_repeats)], place, settings)


def profile_lift(settings: Settings, place: Place) -> dict[str, Any]:
    """Profile Lift, real simulators, policy and update included, where collecting and training take equally long."""
    arguments = [*balanced_arguments(settings, place, "Lift"), *settings.lift_overrides]
    return profile("lift", arguments, place, settings)
