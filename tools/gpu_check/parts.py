"""The parts of the GPU check: in which order they run, what they print, and the page."""

from __future__ import annotations

import argparse
import shutil
import time
import traceback
from collections.abc import Callable, Iterator

import torch

from asyncflow.rollout import inference
from asyncflow.run.folder import describe_versions
from tools.bench.common.pages import Page
from tools.bench.common.report import (
    Finding,
    conclude,
    describe_command,
    describe_machine,
    describe_setting,
    describe_software,
)
from tools.gpu_check.runs import (
    EQUAL_TOLERANCE,
    NUM_UPDATES,
    Scale,
    cheap_weights,
    check_equality,
    check_memory_plan,
    check_ratio,
)
from tools.gpu_check.speed import Tables, check_inference, check_profiles
from tools.gpu_check.vla import check_vla
from tools.gpu_check.weights import hunt_on_device

NUM_LEASES, NUM_WEIGHTS = 100, 2**24

Part = Callable[[Scale, Tables], Iterator[Finding]]

PARTS: dict[str, Part] = {
    "weights": lambda scale, _: hunt_on_device(scale.device, *_hunt_size(scale)),
    "memory": lambda scale, _: check_memory_plan(scale),
    "ratio": lambda scale, _: check_ratio(scale),
    "equality": lambda scale, _: check_equality(scale),
    "inference": lambda scale, _: check_inference(scale),
    "profile": check_profiles,
    "vla": check_vla,
}
NOTES = """
- Seconds: {seconds}
- Equality: {updates} updates of each mode, with deterministic algorithms. Compared are weights, optimizer state, every
  tensor of every rollout that was trained, the versions that acted, and metrics but for timing. Where a GPU has no
  deterministic algorithm, weights may differ by {tolerance:g}, and the table says so.
- The wide policy begins with scaled normal weights instead of orthogonal ones, which take a processor long.
"""


def _hunt_size(scale: Scale) -> tuple[int, int]:
    return (20, 20_000) if scale.is_quick else (NUM_LEASES, NUM_WEIGHTS)


def check(arguments: argparse.Namespace) -> int:
    """Run parts, print what they find, write the page if there is to be one, and return the exit code."""
    if arguments.quick:
        inference.BACKEND = "eager"
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    scale, tables = Scale(device, arguments.quick), Tables()
    findings: list[Finding] = []
    seconds = []
    for name in PARTS:
        if name in arguments.only:
            start = time.monotonic()
            findings += run_part(name, scale, tables)
            seconds.append(f"{name} {time.monotonic() - start:.0f}")
    print("\n".join(tables.lines))
    if arguments.out:
        notes = NOTES.format(seconds=", ".join(seconds), updates=NUM_UPDATES, tolerance=EQUAL_TOLERANCE)
        make_page(findings, [notes, "\n".join(tables.lines)], device, arguments.commit).write(arguments.out)
    print(f"seconds: {', '.join(seconds)}")
    return conclude(findings)


def run_part(name: str, scale: Scale, tables: Tables) -> list[Finding]:
    """Run a part, print its findings as they come, and return them; one that breaks has failed."""
    print(f"{name}:", flush=True)
    findings = []
    try:
        with cheap_weights():
            for finding in PARTS[name](scale, tables):
                findings.append(finding)
                print_finding(finding)
    except Exception as error:  # it does not hide what the other parts find
        traceback.print_exc()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        findings.append(Finding(f"{name}: the part comes to its end", reason, "no error", False))
        print_finding(findings[-1])
    return findings


def print_finding(finding: Finding) -> None:
    """Show one line: whether it is met, what was checked, the figure, the target."""
    print(f"  met: {finding.verdict or '-':7} {finding.what}: {finding.measured} [{finding.target}]", flush=True)


def make_page(findings: list[Finding], notes: list[str], device: torch.device, commit: str | None) -> Page:
    """Return the page.

    Args:
        findings: Rows of the table.
        notes: What follows the table.
        device: Where it ran.
        commit: What the page names where the code lies outside its repository.
    """
    num_failed = sum(not finding.is_met for finding in findings)
    setting = describe_setting(describe_machine(), _describe_software(commit))
    said = f"**{num_failed} of {len(findings)} checks failed.**" if num_failed else "Everything that is checked held."
    return Page(
        f"The GPU check{'' if device.type == 'cuda' else ', on a CPU'}",
        setting=f"{setting}- Device: {_describe_device(device)}\n- Command: `{describe_command()}`\n\n{said}",
        findings=findings,
        sections=notes,
    )


def _describe_software(commit: str | None) -> dict[str, str]:
    if commit is None and shutil.which("git"):
        return describe_software()
    versions = describe_versions()
    found = versions.pop("git_commit")
    del versions["processor"]
    return {"commit": commit or found, **versions}


def _describe_device(device: torch.device) -> str:
    if device.type == "cpu":
        return "the processor"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
