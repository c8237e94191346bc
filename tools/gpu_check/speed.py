"""Time a decision on a GPU, as it is, compiled and captured, and profile both modes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from tensordict import TensorDict

from asyncflow.config.sections import Config
from asyncflow.profile.leg import num_warmup, run_leg
from asyncflow.profile.measure import Profile, ProfileOptions, measure_profile
from asyncflow.profile.picture import describe_interval
from asyncflow.profile.read import Window, stage_times
from asyncflow.profile.report import show, summarise
from asyncflow.rollout.inference import make_sampler
from asyncflow.rollout.weights import make_acting_copy
from asyncflow.seeding import policy_noise
from tools.bench.common.report import REPORTED, Finding
from tools.bench.policies.inference import time_decisions
from tools.gpu_check.runs import TOY, WIDE, Scale, new_policy

DECISION_TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}
EAGER = "none"
NUM_DECISIONS, NUM_REPEATS = 50, 2
NUM_MEASURED = {TOY: 20, WIDE: 5}  # updates of a leg


# Decisions.


def check_inference(scale: Scale) -> Iterator[Finding]:
    """Time a decision of both policies in every mode, from staging its noise to fetching its actions."""
    tolerance = DECISION_TOLERANCE[scale.device.type]
    for name in (TOY, WIDE):
        config = scale.config(name)
        policy = make_acting_copy(new_policy(config, scale.device)[0])
        state = torch.rand(config.env.num_envs, 4, generator=torch.Generator().manual_seed(0)).to(scale.device)
        obs = TensorDict({"state": state}, state.shape[:1])
        noise = policy_noise(0, range(len(state)), 0, policy.noise_size)
        expected = policy.sample_actions(obs, "train", noise.to(scale.device))
        eager_s = 0.0
        for mode in scale.modes:
            sample = make_sampler(policy, mode, obs, noise.to(scale.device))
            if mode != EAGER:
                largest = _largest_difference(sample(obs, noise.to(scale.device)), expected)
                what = f"{name}, policy.compile={mode}: log-prob of a decision against the policy's own"
                found = f"differs by {largest:.1e} at most"
                yield Finding(what, found, f"<= {tolerance:g}", largest <= tolerance)
            num_decisions = 5 if scale.is_quick else NUM_DECISIONS
            seconds = statistics.median(time_decisions(policy, sample, obs, noise, num_decisions))
            eager_s = eager_s or seconds
            shown = f"{1000 * seconds:.3f} ms, {eager_s / seconds:.2f} times as fast as none"
            what = f"{name}, policy.compile={mode}: a decision of {len(state)} environments, median"
            yield Finding(what, shown, REPORTED, True)


def _largest_difference(decision: TensorDict, expected: TensorDict) -> float:
    return float((decision["log_probs"] - expected["log_probs"]).abs().max())


# Profiles.


@dataclass
class Tables:
    """Stands in for the console: keeps the tables and lines of a profile as Markdown."""

    lines: list[str] = field(default_factory=list)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Keep a table."""
        self.lines += ["", *(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)), ""]

    def notice(self, text: str) -> None:
        """Keep a line."""
        self.lines.append(f"- {text}")


def check_profiles(scale: Scale, tables: Tables) -> Iterator[Finding]:
    """Profile both policies, and the wide one with simulators so slow that collecting takes as long as training."""
    for name in (TOY, WIDE):
        config = scale.config(name, trainer__total_updates=1000)
        yield profile_policy(scale, name, config, ProfileOptions(), tables)
    balance_s = _balance(config)
    options = ProfileOptions(env_latency_s=balance_s)
    yield profile_policy(scale, f"{WIDE}, simulators take {balance_s:.2f} s a rollout", config, options, tables)


def _balance(config: Config) -> float:
    """Return the seconds by which training a rollout takes longer than collecting it; never less than a tenth."""
    leg = run_leg(config, "standard", Window(num_warmup(config), 2))
    times = stage_times([leg], [leg])
    return max(0.1, times.update_s - times.collect_s)


def profile_policy(scale: Scale, title: str, config: Config, options: ProfileOptions, tables: Tables) -> Finding:
    """Profile both modes of a policy, keep the tables, and return what overlap gave."""
    num_updates = 2 if scale.is_quick else NUM_MEASURED[TOY if title == TOY else WIDE]
    fixed: dict[str, Any] = {"num_repeats": 1 if scale.is_quick else NUM_REPEATS, "num_updates": num_updates}
    profile = measure_profile(config, replace(options, **fixed), lambda text: None)
    tables.lines += ["", f"## Profile: {title}"]
    show(summarise(profile), tables)  # type: ignore[arg-type]
    return Finding(f"{title}: decisions/s of vla over standard", _describe(profile), REPORTED, True)


def _describe(profile: Profile) -> str:
    reached = profile.speedup()
    limits = f"ceilings {profile.ideal.two_stage:.2f} ideal, {profile.contended.two_stage:.2f} contended"
    interval = describe_interval(asdict(reached))
    return f"{reached.value:.2f} (95 %: {interval}); {limits}; predicted {profile.predicted:.2f}"
