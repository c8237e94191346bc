"""Write `docs/benchmarks/policies.md` from the records of `tools.bench.policies`.

Nothing is measured here and no number stands in this file: the page cannot say what the records do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from asyncflow.metrics.console import format_bytes
from asyncflow.profile.picture import describe_interval
from tools.bench.common.pages import Page
from tools.bench.common.records import Place, Records, describe_records
from tools.bench.common.report import Finding, to_table
from tools.bench.policies.frozen import KEPT, RUN_AGAIN, TRAINED, VARIANTS
from tools.bench.policies.judge import judge, measured_flops, median_s, preset_gflops
from tools.bench.policies.settings import CPU, SIZES, SUBJECTS

NEEDS_GPU, MISSING = "needs a GPU", "not measured yet"
UPDATES = {
    TRAINED: "the backbone is trained",
    RUN_AGAIN: "frozen, run again by the update",
    KEPT: "frozen, its features kept (`policy.freeze_backbone`)",
}

Figures = dict[str, Any]


def write_page(place: Place, records: Records) -> list[Finding]:
    """Write what there are records of, and return the rows of the table of targets."""
    findings = judge(records)
    make_page(records, findings).write(place.page)
    return findings


def make_page(records: Records, findings: list[Finding]) -> Page:
    """Return the page."""
    devices = sorted({record["settings"]["device"] for record in records.values()})
    has_gpu = devices != [CPU]
    return Page(
        "Policies",
        introduction=INTRODUCTION if has_gpu else f"{INTRODUCTION}{WITHOUT_GPU}",
        setting=describe_records(records, f"- Device of the policies: {', '.join(devices)}\n"),
        findings=findings,
        sections=[
            describe_profiles(records, has_gpu),
            describe_decisions(records, has_gpu),
            describe_frozen(records),
        ],
    )


INTRODUCTION = """What policies cost, and what overlap gives with them: Lift, 16 environments unless a command says
otherwise. The MLP begins with the shipped weights, the others with random ones; but for episodes that end early,
nothing that is timed depends on them.
"""
WITHOUT_GPU = """
**No GPU here.** Everything was run on the processor. A run with `base` takes one: its rows in the first two tables are
empty, nothing was captured as a CUDA graph, and of its update only the smallest one was run.
"""


# Both modes.


def describe_profiles(records: Records, has_gpu: bool) -> str:
    """Return the section about both modes, and the advice."""
    head = ["policy", "Te, ms", "Ti, ms", "Tc, s", "Tt, s", "decisions/s", "speed-up (95 %)", "ideal", "contended"]
    rows, advice = [], []
    for subject, chosen in SUBJECTS.items():
        record = records.get(f"profile_{subject}")
        if record is None:
            rows.append([chosen.title, why_not(subject, has_gpu), *[""] * (len(head) - 2)])
            continue
        found = record["figures"]["profile"]
        rows.append([chosen.title, *profile_cells(found)])
        advice.append(f"- {chosen.title}: {found['advice']}.")
    return "\n".join([PROFILES.format(table=to_table(head, rows)), *advice, ""])


PROFILES = """## Both modes
{table}

In each cell, the first time is that of the stage alone (synchronous mode), the second that while the others run
(asynchronous mode, policy lag 1). Te is a chunk in the simulators, Ti a decision call, Tc collecting a rollout, Tt
training on it; then fresh decisions a second. The speed-up is that of asynchronous over synchronous mode, with its
interval over blocks. In brackets behind a ceiling stands the share of it that was reached.
[profiling.md](../profiling.md) tells how they are measured, and what the ceilings are. The profiler's advice:
"""


def why_not(subject: str, has_gpu: bool) -> str:
    """Return why there is no figure of a policy."""
    return NEEDS_GPU if SUBJECTS[subject].needs_gpu and not has_gpu else MISSING


def profile_cells(found: Figures) -> list[str]:
    """Return a profile's cells of the table."""
    modes = [found["modes"][mode] for mode in ("standard", "vla")]

    def both(name: str, scale: float, digits: int) -> str:
        return " / ".join(f"{scale * mode['stages'][name]['mean_s']:.{digits}f}" for mode in modes)

    reached = found["speedup"]["standard"]
    limits = [found["ceilings"][kind]["two_stage"] for kind in ("ideal", "contended")]
    return [
        both("chunk", 1000, 1),
        both("inference", 1000, 1),
        both("collect", 1, 2),
        both("trainer", 1, 2),
        " / ".join(f"{mode['decisions_per_s']:.1f}" for mode in modes),
        f"{reached['value']:.3f} ({describe_interval(reached)})",
        *(f"{limit:.3f} ({100 * reached['value'] / limit:.0f} %)" for limit in limits),
    ]


# Decisions.


def describe_decisions(records: Records, has_gpu: bool) -> str:
    """Return the section about one decision."""
    head = ["policy", "at once", "eager, ms", "compiled, ms", "to compile, s", "captured, ms", "to capture, s"]
    rows = []
    for subject, chosen in SUBJECTS.items():
        record = records.get(f"inference_{subject}")
        if record is None:
            rows.append([chosen.title, why_not(subject, has_gpu), *[""] * (len(head) - 2)])
            continue
        rows += [[chosen.title, *cells] for cells in decision_rows(record["figures"]["decisions"])]
    return DECISIONS.format(table=to_table(head, rows))


DECISIONS = """## A decision
{table}

Median and, in brackets, first to last decile: from the observation on the device to the actions on the CPU, as
the collector decides (`policy.compile: none | compile | graph`). Warm-up is left out. Compiling and capturing happen
once, before the first rollout; their seconds include the first decision, and the compiler finds nothing cached. The
ways take turns. What a frozen backbone makes of an observation is part of the decision, and neither compiled nor
captured.
"""


def decision_rows(decisions: list[Figures]) -> Iterator[list[str]]:
    """Yield the cells behind a policy's name for each number of environments."""
    for num_envs in dict.fromkeys(row["num_envs"] for row in decisions):
        of = {row["mode"]: row for row in decisions if row["num_envs"] == num_envs}
        compiled, captured = of["compile"], of.get("graph")
        last = [NEEDS_GPU, ""] if captured is None else [describe_spread(captured), f"{captured['build_s']:.1f}"]
        eager = describe_spread(of["none"])
        yield [str(num_envs), eager, describe_spread(compiled), f"{compiled['build_s']:.1f}", *last]


def describe_spread(row: Figures) -> str:
    """Return median and deciles in milliseconds."""
    median, low, high = (1000 * row[name] for name in ("median_s", "low_s", "high_s"))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


# Frozen backbones.


def describe_frozen(records: Records) -> str:
    """Return the sections about updates and rings."""
    of = {size: records[f"frozen_{size}"] for size in SIZES if f"frozen_{size}" in records}
    if not of:
        return ""
    head = ["size", "update", "s", "share", "GFLOP", "share", "GFLOP a decision, preset", "share"]
    rows = [cells for size, record in of.items() for cells in update_rows(size, record["figures"])]
    shapes = "\n".join(f"- `{size}`: {describe_extent(record)}" for size, record in of.items())
    kept = [cells for size, record in of.items() for cells in ring_rows(size, record["figures"]["ring"])]
    ring_head = ["size", "kept", "an observation", "the ring", "share of pictures"]
    return FROZEN.format(updates=to_table(head, rows), shapes=shapes, rings=to_table(ring_head, kept))


FROZEN = """## What a frozen backbone saves
{updates}

Updates of rollouts that are one version old, as in asynchronous mode, filled with random numbers; median seconds of
those after the first one. Shares are of the update that trains the backbone. Operations are those of matrix products,
convolutions and attention, forward and backward, counted in the update that was run: its values, its proximal
log-probs, its steps. Each kind is proportional to what it works on, so that they give those of the preset's shape,
where an observation behind a rollout's end weighs less and there are more epochs. What was run:
{shapes}

What is kept instead of pictures:

{rings}

Bytes come from the ring's plan: rollouts of the preset's shape, two slots. Where features take more than
pictures, the time is bought with memory.
"""


def update_rows(size: str, figures: Figures) -> Iterator[list[str]]:
    """Yield a row for each way to treat the backbone."""
    for variant in VARIANTS:
        cells = [f"`{size}`", UPDATES[variant]]
        for value in (median_s, measured_flops, preset_gflops):
            number = value(figures, variant)
            shown = number / 1e9 if value is measured_flops else number
            cells += [f"{shown:,.2f}", f"{number / value(figures, TRAINED):.3f}"]
        yield cells


def describe_extent(record: Figures) -> str:
    """Return what was updated on, and how often."""
    found = record["figures"]["updates"][TRAINED]
    extent, times, epochs = found["extent"], len(found["seconds"]), found["extent"]["num_epochs"]
    passes = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    timed = "timed once" if times == 1 else f"timed {times} times"
    keys = f"preset `{record['settings']['preset']}`, `{' '.join(record['settings']['overrides'])}`"
    return (
        f"{extent['num_decisions']} decisions, values of {extent['num_obs']} observations, {passes}, {timed} ({keys})"
    )


def ring_rows(size: str, ring: dict[str, dict[str, int]]) -> Iterator[list[str]]:
    """Yield a row for each thing that is kept."""
    pictures = next(iter(ring.values()))
    for kept, found in ring.items():
        share = f"{found['obs_bytes'] / pictures['obs_bytes']:.2f}"
        yield [f"`{size}`", kept, f"{found['obs_bytes']:,} bytes", format_bytes(found["ring_bytes"]), share]
