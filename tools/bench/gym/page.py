"""The page: returns of every learner, their interval over seeds, and whether asyncflow learns what its peer learns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from tools.bench.common.pages import Page
from tools.bench.common.report import MODE_NAMES, Finding, describe_setting, to_table
from tools.bench.gym.setting import (
    CLIP,
    HIDDEN,
    LAMBDA,
    MAX_GRAD_NORM,
    NUM_ENVS,
    NUM_EPOCHS,
    NUM_STEPS,
    TASKS,
    VF_COEF,
)

SB3, STANDARD, ASYNC = "stable-baselines3", "asyncflow standard", "asyncflow vla"
LEARNERS = (SB3, STANDARD, ASYNC)
NAMES = {SB3: SB3, STANDARD: f"asyncflow, {MODE_NAMES['standard']}", ASYNC: f"asyncflow, {MODE_NAMES['vla']}"}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by seeds

Returns = dict[str, dict[str, dict[int, float]]]
"""Task -> learner -> seed -> mean return of its evaluation episodes."""


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a mean over seeds (Student's t); both infinite for one seed."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def judge(returns: Returns) -> list[Finding]:
    """Return whether each of asyncflow's modes reaches its peer: a mean no lower than that of the peer's worst seed."""
    found = []
    for task, by_learner in returns.items():
        peer = list(by_learner.get(SB3, {}).values())
        for learner in (STANDARD, ASYNC):
            values = list(by_learner.get(learner, {}).values())
            if peer and values:
                mean = statistics.mean(values)
                what = f"{TASKS[task].env_id}: {NAMES[learner]}, mean return of {len(values)} seeds"
                target = f">= {min(peer):.1f}, the lowest of {len(peer)} seeds of {SB3}"
                found.append(Finding(what, f"{mean:.1f}", target, mean >= min(peer)))
    return found


def collect(records: Iterable[dict[str, Any]]) -> Returns:
    """Return the mean return of every seed."""
    returns: Returns = {}
    for record in records:
        seeds = returns.setdefault(record["task"], {}).setdefault(record["learner"], {})
        seeds[record["seed"]] = statistics.mean(record["result"]["returns"])
    return returns


def write_page(records: Sequence[dict[str, Any]]) -> str:
    """Return the page.

    Args:
        records: Of finished runs, of which at least one is asyncflow's.
    """
    returns = collect(records)
    own = [record for record in records if record["learner"] != SB3]
    commits = sorted({record["software"]["commit"] for record in records})
    software = own[0]["software"] | {"commit": "`, `".join(commits)}
    peers: dict[str, str] = next((record["peers"] for record in records if record["learner"] == SB3), {})
    versions = ", ".join(f"{name} {version}" for name, version in peers.items())
    commands = "\n".join(dict.fromkeys(record["command"] for record in records))
    stds = {(record["task"], record["learner"]): record["std"] for record in records}
    rows = []
    for task, by_learner in returns.items():
        for learner in LEARNERS:
            values = [by_learner.get(learner, {})[seed] for seed in sorted(by_learner.get(learner, {}))]
            if values:
                low, high = mean_interval(values)
                seeds = ", ".join(f"{value:.0f}" for value in values)
                cells = [TASKS[task].env_id, f"{TASKS[task].env_steps:,}", NAMES[learner], f"{stds[task, learner]:g}"]
                rows.append([*cells, f"{statistics.mean(values):.0f}", f"{low:.0f} to {high:.0f}", seeds])
    head = ["task", "env steps", "trained by", "std at first", "mean return", "95 % over seeds", "each seed"]
    return Page(
        "Beside stable-baselines3 on gymnasium's tasks",
        setting=f"{describe_setting(records[0]['machine'], software)}- Peer: {versions}\n\n```\n{commands}\n```",
        findings=judge(returns),
        sections=[to_table(head, rows), _describe_setting(returns)],
    ).text()


def _describe_setting(tasks_measured: Iterable[str]) -> str:
    tasks = "\n".join(
        f"- {task.env_id}: gamma {task.gamma}, step size {task.learning_rate}, minibatches of {task.batch_size}, "
        f"{task.num_episodes} episodes at the end."
        for task in map(TASKS.__getitem__, tasks_measured)
    )
    return (
        f"Both train actor and critic of {HIDDEN} units each from scratch, on {NUM_ENVS} environments, {NUM_STEPS}\n"
        f"env steps of each in a rollout, {NUM_EPOCHS} epochs, clip {CLIP}, lambda {LAMBDA}, weight of the value\n"
        f"loss {VF_COEF}, gradient norm {MAX_GRAD_NORM}, one action a decision. Neither scales observations or\n"
        "rewards, and neither was tuned for these settings. The std at first is that of exploration before\n"
        "training, in the environment's units. What differs:\n\n"
        "- stable-baselines3 has tanh networks, normalises advantages in each minibatch, and limits one gradient norm\n"
        "  of actor and critic together.\n"
        "- asyncflow has ReLU networks, normalises advantages in each rollout, and limits the norms of actor and\n"
        "  critic apart. Synchronous, it collects, then trains; asynchronous, it collects in a thread while it\n"
        "  trains, one update behind.\n\n"
        f"{tasks}\n\n"
        "At the end of training the policies act without noise in episodes from the same start states. A seed's\n"
        "return is the mean of them. The interval is Student's, over seeds."
    )
