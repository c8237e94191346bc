"""The GPU check in small, on the processor: it needs no simulator, and notices what it is there to notice."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asyncflow.policies import GaussianPolicy
from tools.bench.common.report import REPORTED, Finding
from tools.gpu_check import parts as gpu_check_parts
from tools.gpu_check import run as gpu_check
from tools.gpu_check import runs as gpu_check_runs
from tools.gpu_check import weights as gpu_check_weights
from tools.gpu_check.runs import TOY, Outcome, Scale
from tools.gpu_check.weights import DeviceHunt

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[2]
SIMULATORS = ("robosuite", "robomimic", "mujoco", "mujoco_py")
BLOCKED = """
import runpy, sys
blocked, sys.argv = sys.argv[1].split(","), sys.argv[2:]
sys.modules |= dict.fromkeys(blocked)  # whoever imports one fails
runpy.run_module("tools.gpu_check", run_name="__main__")
"""


def run_tool(blocked, *arguments, timeout_s=240):
    command = [sys.executable, "-c", BLOCKED, ",".join(blocked), "gpu_check", *arguments]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, cwd=REPOSITORY, env=hidden, capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.mark.slow
def test_it_runs_without_simulators_and_writes_a_page(tmp_path):
    done = run_tool(SIMULATORS, "--device", "cpu", "--quick", "--out", str(tmp_path / "page.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"\n{part}:\n" in f"\n{done.stdout}" for part in gpu_check.PARTS)
    page = (tmp_path / "page.md").read_text()
    assert all(f"- {line}: " in page for line in ("Hardware", "Commit", "Versions", "Device", "Command", "Seconds"))
    for policy in ("toy", "wide flow"):
        assert all(f"| {policy}, L = {lag}: vla equals standard | bit for bit" in page for lag in (0, 1, 2))
        assert f"| {policy}: decisions/s of vla over standard |" in page
        assert f"## Profile: {policy}\n" in page


def test_a_machine_without_a_gpu_is_one_line_and_exit_code_2():
    done = run_tool(SIMULATORS)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "finds no CUDA device here" in done.stderr


def test_a_missing_package_is_one_line_and_exit_code_2():
    done = run_tool(("tensordict", "pydantic"), "--device", "cpu")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"gpu_check: needs {', '.join(gpu_check.PACKAGES)}; not installed: tensordict, pydantic"
    ]


def check(monkeypatch, capsys, *findings):
    """Run the check with parts that yield these findings, and return exit code and output."""

    def yield_them(scale, tables):
        for finding in findings:
            if isinstance(finding, Exception):
                raise finding
            yield finding

    monkeypatch.setattr(gpu_check_parts, "PARTS", {"memory": yield_them, "ratio": lambda scale, tables: iter(())})
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu"])
    return gpu_check_parts.check(gpu_check.parse_arguments()), capsys.readouterr().out


def test_a_check_that_fails_is_exit_code_1_and_named(monkeypatch, capsys):
    good, bad = Finding("this", "1", "1", True), Finding("that", "2", "1", False)
    code, output = check(monkeypatch, capsys, good, bad)
    assert code == 1
    assert output.endswith("missed: that: 2; target 1\n")
    assert check(monkeypatch, capsys, good)[0] == 0


def test_a_part_that_breaks_has_failed_and_the_next_one_runs(monkeypatch, capsys):
    code, output = check(monkeypatch, capsys, ValueError("of no use"))
    assert code == 1
    assert "memory: the part comes to its end: ValueError: of no use" in output
    assert "ratio:" in output


def test_the_page_says_what_failed_and_judges_no_figure_that_is_only_reported():
    findings = [Finding("a", "1", "1", True), Finding("b", "2", "1", False), Finding("c", "3 s", REPORTED, True)]
    page = gpu_check_parts.make_page(findings, ["- a note"], CPU, commit="abc").text()
    assert "**1 of 3 checks failed.**" in page
    assert "| a | 1 | 1 | yes |\n| b | 2 | 1 | **no** |\n| c | 3 s | reported |  |\n" in page
    assert "- Commit: `abc`" in page


def outcome(**changes):
    values = {"tensors": {"weight w": torch.ones(2), "rollout 0, obs": torch.ones(2)}, "rows": [{"updates": 1.0}]}
    return Outcome(**(values | {"versions": [0, 0, 1, 2]} | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": {"weight w": torch.tensor([1.0, 1.0000001]), "rollout 0, obs": torch.ones(2)}},
        {"tensors": {"weight w": torch.ones(2)}},
        {"rows": [{"updates": 2.0}]},
        {"versions": [0, 1, 2, 3]},
    ],
)
def test_modes_that_differ_in_anything_are_not_equal_on_a_cpu(changes):
    assert gpu_check_runs.compare("x", outcome(), outcome(), lag=1).is_met
    assert not gpu_check_runs.compare("x", outcome(), outcome(**changes), lag=1).is_met
    assert not gpu_check_runs.compare("x", outcome(**changes), outcome(), lag=1).is_met


def test_a_ratio_that_is_not_one_is_noticed(monkeypatch):
    forward = GaussianPolicy.default_forward

    def shift(self, batch):
        evaluated = forward(self, batch)
        return evaluated.set("log_probs", evaluated["log_probs"] + 1e-4)

    monkeypatch.setattr(GaussianPolicy, "default_forward", shift)
    monkeypatch.setattr(Scale, "modes", ["none"])
    toy, wide = gpu_check_runs.check_ratio(Scale(CPU, is_quick=True))
    assert (toy.is_met, wide.is_met) == (False, True)


def test_a_ring_of_another_size_than_planned_is_noticed(monkeypatch):
    plan = gpu_check_runs.plan_ring
    wrong = property(lambda plan: 1)
    monkeypatch.setattr(gpu_check_runs, "_check_ring_stays", lambda scale: Finding("", "", "", True))
    assert all(finding.is_met for finding in gpu_check_runs.check_memory_plan(Scale(CPU, is_quick=True)))
    monkeypatch.setattr(type(plan(*_planned())), "num_bytes", wrong)
    first = next(gpu_check_runs.check_memory_plan(Scale(CPU, is_quick=True)))
    assert not first.is_met


def _planned():
    policy, spec = gpu_check_runs.new_policy(Scale(CPU, is_quick=True).config(TOY), CPU)
    return policy, spec, 4, 2, 1


def test_the_hunt_notices_torn_weights(monkeypatch):
    hunt = DeviceHunt(CPU, lag=0, num_leases=1, is_exact=True, num_weights=64)

    def overwrite_half_of_what_is_leased(device, delays):
        hunt._publisher._snapshots[0][0].fill_(7)

    monkeypatch.setattr(gpu_check_weights, "stall", overwrite_half_of_what_is_leased)  # between the lease and its copy
    hunt._lease(0, random.Random(0))
    assert hunt.checks.failures == ["L = 0: torn: version 0 holds {0.0, 7.0}"]


def test_weights_made_cheaply_are_orthogonal_again_afterwards():
    orthogonal, wide = torch.nn.init.orthogonal_, torch.empty(300, 100)
    with gpu_check_runs.cheap_weights():
        torch.nn.init.orthogonal_(wide, 2.0)
    assert torch.nn.init.orthogonal_ is orthogonal
    assert float(wide.std()) == pytest.approx(2.0 / 100**0.5, rel=0.1)
