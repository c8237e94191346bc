"""Hold the records of `tools.bench.policies` against the target of frozen backbones; return rows of a table.

Owns the target and the verdicts.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from tools.bench.common.records import Records
from tools.bench.common.report import REPORTED, Finding
from tools.bench.policies.frozen import KEPT, RUN_AGAIN, TRAINED, Extent, flops_per_decision

MAX_SHARE = 1 / 3
JUDGED = "base"
DONE = {TRAINED: "trains the backbone", RUN_AGAIN: "runs the frozen backbone again"}

Figures = dict[str, Any]


def judge(records: Records) -> list[Finding]:
    """Return the rows of the judged size, if it was measured."""
    record = records.get(f"frozen_{JUDGED}")
    return [] if record is None else judge_frozen(record["figures"], is_judged=not record["settings"]["is_tiny"])


def judge_frozen(figures: Figures, is_judged: bool = True) -> list[Finding]:
    """Compare updates on kept features with both others, in seconds as measured and in operations at the preset.

    Args:
        figures: Of the part.
        is_judged: Whether there is a target; there is none for another size.
    """
    rows = []
    for other, does in DONE.items():
        kept_s, other_s = (median_s(figures, variant) for variant in (KEPT, other))
        rows.append(_row(f"seconds of an update that was run, over one that {does}", kept_s, other_s, "s"))
        kept, against = (preset_gflops(figures, variant) for variant in (KEPT, other))
        rows.append(_row(f"operations a decision at the preset's shape, over one that {does}", kept, against, "GFLOP"))
    return rows if is_judged else [replace(row, target=REPORTED, is_met=True) for row in rows]


def _row(what: str, kept: float, other: float, unit: str) -> Finding:
    share = kept / other
    measured = f"{share:.3f}: {kept:,.2f} of {other:,.2f} {unit}"
    return Finding(f"`{JUDGED}`, features kept: {what}", measured, "<= 1/3", share <= MAX_SHARE)


def median_s(figures: Figures, variant: str) -> float:
    """Return the median seconds of an update."""
    return float(statistics.median(figures["updates"][variant]["seconds"]))


def measured_flops(figures: Figures, variant: str) -> float:
    """Return the operations of the update that was run."""
    return float(sum(figures["updates"][variant]["flops"].values()))


def preset_gflops(figures: Figures, variant: str) -> float:
    """Return the operations per decision of an update of the preset's shape, in billions."""
    found = figures["updates"][variant]
    per_decision = flops_per_decision(found["flops"], Extent(**found["extent"]), Extent(**figures["preset"]))
    return per_decision / 1e9
