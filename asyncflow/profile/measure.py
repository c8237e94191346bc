"""`asyncflow profile`: runs both buffer types in turns on one configuration and finds out what overlap gives.

This file runs the legs in their order and emulates stages. `read` reads a leg's figures, `model` draws conclusions from
them, and `report` shows them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from asyncflow.config.sections import MAX_SECONDS, Config
from asyncflow.config.tasks import TOYS
from asyncflow.errors import ConfigError
from asyncflow.files import make_new_folder
from asyncflow.profile.leg import measure_span_cost, num_warmup, run_leg, vla_lag
from asyncflow.profile.model import (
    Ceilings,
    Interval,
    Situation,
    StageTimes,
    advise,
    ceilings,
    log_ratio_interval,
    mean,
    predict_speedup,
    spread,
)
from asyncflow.profile.read import Leg, Mode, Window, stage_times
from asyncflow.profile.slow import Emulation, Spread
from asyncflow.run.build import check_start
from asyncflow.run.folder import name_tasks

WRITTEN = ("profile.json", "profile.csv", "profile.png", "trace.json")
RATIOS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)  # Tt / Tc of a sweep
SWEEP_COLLECT_S = (0.5, 1.0)  # Tc of a sweep: longer where an update is long, so that small ratios can be reached
LEG_S, MIN_UPDATES, MAX_UPDATES, SWEEP_UPDATES = 4.0, 3, 40, 6

Say = Callable[[str], None]


@dataclass(frozen=True)
class ProfileOptions:
    """Settings of a profile.

    Attributes:
        inference_latency_s: Emulated seconds that a rollout takes longer in the policy.
        env_latency_s: The same in the simulators.
        update_latency_s: The same in the update.
        spread: How these seconds vary from rollout to rollout.
        variation: Their standard deviation over their mean.
        num_repeats: Times standard, vla, vla, standard.
        num_updates: Measured updates of a leg; None for some seconds of them.
        is_sweep: Whether the ratio of training to collecting is varied.
    """

    inference_latency_s: float = 0.0
    env_latency_s: float = 0.0
    update_latency_s: float = 0.0
    spread: Spread = "constant"
    variation: float = 0.5
    num_repeats: int = 3
    num_updates: int | None = None
    is_sweep: bool = False

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: A number is out of its range.
        """
        for name in ("inference_latency_s", "env_latency_s", "update_latency_s"):  # before they are divided
            if not 0 <= getattr(self, name) <= MAX_SECONDS:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be 0 to {MAX_SECONDS:g}")
        for flag, number in (("--num-repeats", self.num_repeats), ("--num-updates", self.num_updates)):
            if number is not None and number < 1:
                raise ConfigError(f"{flag} {number}: must be at least 1")


@dataclass(frozen=True)
class Block:
    """Standard, vla, vla, standard; with several groups within two serial legs."""

    legs: list[Leg]

    def seconds(self, mode: Mode) -> float:
        """Return the mean seconds per fresh decision of its legs of a mode."""
        return mean([leg.decision_s for leg in self.legs if leg.mode == mode])


@dataclass(frozen=True)
class Profile:
    """All legs on one configuration, and what follows from them."""

    config: Config
    options: ProfileOptions
    blocks: list[Block]
    span_s: float

    @property
    def num_env_groups(self) -> int:
        """G."""
        return self.config.collector.num_env_groups

    @property
    def serial_mode(self) -> Mode:
        """The mode in which nothing overlaps: with one group it is `standard`."""
        return "serial" if self.num_env_groups > 1 else "standard"

    @property
    def modes(self) -> list[Mode]:
        """Modes that were run."""
        return ["serial", "standard", "vla"] if self.num_env_groups > 1 else ["standard", "vla"]

    def legs(self, mode: Mode) -> list[Leg]:
        """Return the legs of a mode, in the order in which they were run."""
        return [leg for block in self.blocks for leg in block.legs if leg.mode == mode]

    @property
    def alone(self) -> StageTimes:
        """Stage times while the others do not run."""
        return stage_times(self.legs(self.serial_mode), self.legs("standard"))

    @property
    def at_work(self) -> StageTimes:
        """Stage times while the others run."""
        return stage_times(self.legs("vla"), self.legs("vla"))

    @property
    def ideal(self) -> Ceilings:
        """Ceiling of the speed-up if the stages do not slow each other down."""
        return ceilings(self.alone)

    @property
    def contended(self) -> Ceilings:
        """Ceiling of the speed-up with the slow-down that the stages cause each other."""
        return ceilings(self.alone, self.at_work)

    def speedup(self, over: Mode = "standard") -> Interval:
        """Return the speed-up of asynchronous over another mode, with its interval over the blocks."""
        pairs = [(block.seconds(over), block.seconds("vla")) for block in self.blocks]
        return log_ratio_interval([a for a, _ in pairs], [b for _, b in pairs])

    @property
    def predicted(self) -> float:
        """Speed-up in the model of the ring, with the durations of the synchronous legs."""
        lag = vla_lag(self.config)
        return mean(
            [predict_speedup(leg.collect_s, leg.trainer_s, lag, leg.window.num_warmup) for leg in self.legs("standard")]
        )

    @property
    def tracing_share(self) -> float:
        """Share of the time of the vla legs that tracing took."""
        legs = self.legs("vla")
        in_window = [sum(span.start_s >= leg.start_s for span in leg.spans) for leg in legs]
        return self.span_s * sum(in_window) / sum(leg.seconds for leg in legs)

    @property
    def advice(self) -> str:
        """One sentence about what to change."""
        standard = self.legs("standard")
        sums = [leg.samples[name] for leg in standard for name in ("collect", "trainer")]
        cores = len(os.sched_getaffinity(0))
        is_toy = all(each.task in TOYS for each in self.config.env.each_task())
        return advise(
            Situation(
                alone=self.alone,
                ideal=self.ideal,
                contended=self.contended,
                speedup=self.speedup().value,
                variation=max(spread(samples) / mean(samples) for samples in sums),
                num_env_groups=self.num_env_groups,
                max_policy_lag=vla_lag(self.config),
                num_workers=0 if is_toy else self.config.env.num_workers or cores,
                num_cores=cores,
            )
        )


@dataclass(frozen=True)
class SweepPoint:
    """One ratio of a sweep."""

    wanted: float
    profile: Profile

    @property
    def ratio(self) -> float:
        """Tt / Tc as measured."""
        return self.profile.alone.update_s / self.profile.alone.collect_s


def measure_profile(config: Config, options: ProfileOptions, say: Say) -> Profile:
    """Run all legs of a profile; `say` is given a line about each."""
    emulation = emulate(config, options)
    window = _choose_window(config, options, emulation, say)
    num_legs = options.num_repeats * len(_order(config))
    blocks, span_s = [], measure_span_cost()
    for repeat in range(options.num_repeats):
        legs = []
        for mode in _order(config):
            leg = run_leg(config, mode, window, emulation)
            legs.append(leg)
            number = repeat * len(_order(config)) + len(legs)
            say(f"leg {number}/{num_legs}: {mode}, {window.num_updates} updates, {1 / leg.decision_s:.1f} decisions/s")
        blocks.append(Block(legs))
    return Profile(config, options, blocks, span_s)


def sweep(config: Config, options: ProfileOptions, say: Say) -> Iterator[SweepPoint]:
    """Yield a profile for each ratio of training to collecting; the update's emulated latency makes the ratio.

    A ratio that the update exceeds by itself is measured as it is.
    """
    options = replace(options, num_updates=options.num_updates or SWEEP_UPDATES)
    alone = _time_stages(config, options)
    if not options.inference_latency_s and not options.env_latency_s:
        shortest, longest = SWEEP_COLLECT_S
        wanted_s = min(longest, max(shortest, alone.update_s / min(RATIOS)))
        options = replace(options, inference_latency_s=max(0.0, wanted_s - alone.collect_s))
    collect_s = alone.collect_s + options.inference_latency_s + options.env_latency_s
    for ratio in RATIOS:
        say(f"sweep: training {ratio:g} times as long as collecting")
        latency_s = max(0.0, ratio * collect_s - alone.update_s)
        yield SweepPoint(ratio, measure_profile(config, replace(options, update_latency_s=latency_s), say))


def _time_stages(config: Config, options: ProfileOptions) -> StageTimes:
    """Return the stage times of a run without the latencies of a profile."""
    leg = run_leg(config, "standard", Window(num_warmup(config), 2))
    return stage_times([leg], [leg])


def emulate(config: Config, options: ProfileOptions) -> Emulation:
    """Return what spreads an option's seconds of a rollout over its calls and minibatches."""
    minibatches = config.algorithm.update_epochs * config.algorithm.num_minibatches
    return Emulation(
        inference_s=options.inference_latency_s / config.num_steps,
        env_s=options.env_latency_s / config.num_steps,
        update_s=options.update_latency_s / minibatches,
        spread=options.spread,
        variation=options.variation,
    )


def _order(config: Config) -> list[Mode]:
    """Return the modes of a block; what is compared takes turns, so that drift cancels."""
    if config.collector.num_env_groups > 1:
        return ["serial", "standard", "vla", "vla", "standard", "serial"]
    return ["standard", "vla", "vla", "standard"]


def _choose_window(config: Config, options: ProfileOptions, emulation: Emulation, say: Say) -> Window:
    """Return which updates are measured; without a number, as many as take some seconds by a first leg."""
    warmup = num_warmup(config)
    if options.num_updates is not None:
        return Window(warmup, options.num_updates)
    period_s = mean(run_leg(config, "standard", Window(warmup, 2), emulation).samples["period"])
    num_updates = max(MIN_UPDATES, min(MAX_UPDATES, round(LEG_S / period_s)))
    legs_s = (warmup + num_updates) * period_s * options.num_repeats * len(_order(config))
    say(f"{warmup} updates of warm-up and {num_updates} measured ones a leg, about {legs_s / 60:.1f} min or less")
    return Window(warmup, num_updates)


def prepare(config: Config, options: ProfileOptions, out: str | None) -> Path:
    """Find a user's mistakes before anything is run, then create the folder that a profile is written to.

    Raises:
        ConfigError: The configuration or an option cannot be, the folder holds a profile or cannot be created.
    """
    options.check()
    emulate(config, options).check()
    check_start(config)
    folder = Path(out or f"runs/profile_{name_tasks(config)}_{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        if out is None:
            return make_new_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        found = [name for name in WRITTEN if (folder / name).exists()]
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}") from None
    if found:
        raise ConfigError(f"--out {folder}: already holds {found[0]}, which a profile would replace; choose another")
    return folder
