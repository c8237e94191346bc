"""The page and its picture: success of a policy that is told the goal beside one that is not."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt

from asyncflow.config.overrides import write_override
from tools.bench.common.pages import Page
from tools.bench.common.report import REPOSITORY, Finding, describe_setting, to_table

PAGES = REPOSITORY / "docs" / "benchmarks"
TOLD, UNTOLD = "told", "untold"
# One instruction in place of both tasks' own: the policy sees the same, but not which goal is meant.
CONDITIONS = {TOLD: [], UNTOLD: [write_override("policy.vla.instruction", "go")]}
NAMES = {TOLD: "with the instruction", UNTOLD: "without it"}
COLOURS = {TOLD: "#0072B2", UNTOLD: "#D55E00"}  # Okabe and Ito's, which colour-blind readers can tell apart
LEARNED, CHANCE = 0.9, 0.6  # either goal ends the episode: without the instruction, half of them succeed at best

Record = dict[str, Any]


def final_rates(records: Sequence[Record], condition: str) -> dict[int, float]:
    """Return the success rate after the last update, by seed."""
    return {each["seed"]: each["curve"][-1]["success_rate"] for each in records if each["condition"] == condition}


def judge(records: Sequence[Record]) -> list[Finding]:
    """Return whether every seed learns with the instruction, and none without it."""
    found = []
    for condition, is_met, target in (
        (TOLD, lambda rate: rate >= LEARNED, f">= {LEARNED:.0%} in every seed"),
        (UNTOLD, lambda rate: rate <= CHANCE, f"<= {CHANCE:.0%} in every seed"),
    ):
        if rates := final_rates(records, condition):
            measured = ", ".join(f"{100 * rate:.1f} %" for rate in rates.values())
            what = f"success after the last update, {NAMES[condition]}, seeds {', '.join(map(str, rates))}"
            found.append(Finding(what, measured, target, all(map(is_met, rates.values()))))
    return found


def describe_rows(records: Sequence[Record]) -> str:
    """Return the table of final success, of each seed, task by task, and when it was first as high as is asked for."""
    tasks = list(records[0]["curve"][-1]["tasks"])
    head = [
        "policy",
        "seed",
        "success",
        *tasks,
        "episode, env steps",
        f"env steps to {LEARNED:.0%}",
        "env steps in all",
    ]
    rows = []
    for condition in CONDITIONS:
        for each in (each for each in records if each["condition"] == condition):
            last = each["curve"][-1]
            reached = next((f"{p['env_steps']:,}" for p in each["curve"] if p["success_rate"] >= LEARNED), "-")
            rates = [f"{100 * rate:.1f} %" for rate in (last["success_rate"], *last["tasks"].values())]
            length, total = f"{last['episode_length']:.1f}", f"{last['env_steps']:,}"
            rows.append([NAMES[condition], str(each["seed"]), *rates, length, reached, total])
    return to_table(head, rows)


def draw(records: Sequence[Record]) -> None:
    """Draw every seed thin and the mean of each condition thick, over env steps."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for condition, colour in COLOURS.items():
        curves = [each["curve"] for each in records if each["condition"] == condition]
        if not curves:
            continue
        for curve in curves:
            axes.plot(*_xy(curve), color=colour, linewidth=0.7, alpha=0.5)
        common = zip(*curves, strict=False)  # a run that is cut is shorter
        mean = [
            {name: statistics.mean(point[name] for point in points) for name in ("env_steps", "success_rate")}
            for points in common
        ]
        axes.plot(*_xy(mean), color=colour, linewidth=2.4, label=NAMES[condition])
    axes.axhline(50, color="#767676", linewidth=0.8, linestyle=":", zorder=0)
    axes.set(xlabel="thousand env steps", ylabel="success, %", ylim=(0, 102), title="Two goals, one picture")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(PAGES / "language.png", dpi=120, metadata={"Software": None})
    plt.close(figure)


def _xy(curve: Sequence[dict[str, float]]) -> tuple[list[float], list[float]]:
    return [point["env_steps"] / 1000 for point in curve], [100 * point["success_rate"] for point in curve]


def write_page(records: Sequence[Record]) -> None:
    """Write the page and its picture from the records of finished runs."""
    draw(records)
    commits = sorted({each["software"]["commit"] for each in records})
    setting = describe_setting(records[0]["machine"], records[0]["software"] | {"commit": "`, `".join(commits)})
    commands = "\n".join(dict.fromkeys([each["tool"] for each in records] + ["python -m tools.bench.language --page"]))
    Page(
        "An instruction that decides",
        introduction=INTRODUCTION,
        setting=f"{setting}\n```\n{commands}\n```",
        findings=judge(records),
        sections=[describe_rows(records), NOTES],
    ).write(PAGES / "language.md")


INTRODUCTION = """![Success over env steps, with the instruction and without](language.png)

`toy_language` shows a position and two goals, in one picture and in one state. The instruction says which goal to
reach. Reaching either goal ends the episode, and only the right one is a success (reward 1). Every step is also paid
by how much nearer to the right goal it leads. Environments are spread over both tasks. The tiny VLA starts from
scratch.

The control is the same run with one instruction for both tasks (`policy.vla.instruction=go`): all that it lacks is
which goal is meant. The best that it can do is to go to either goal, which succeeds in half of the episodes. Both train
on fresh data (lag 0), so that both modes give the same curves. Thin lines are seeds, thick ones their mean, the dotted
line is one half.
"""
NOTES = """Every run evaluates itself every ten updates on 200 episodes, 100 of each task, without exploration and on
start states that training never sees. The preset was tuned on other seeds than these. The data are in
[`data/language/`](data/language), a file a run.
"""
