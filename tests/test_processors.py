"""Equality bit for bit on processors that this machine does not have, whose kernels its libraries can be told to run.

Each case is a Python of its own, because libraries choose their kernels while they are loaded.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FAST_STEP = [
    "envs/test_fast_step.py::test_every_task_is_equal_bit_for_bit[Lift]",
    "envs/test_fast_step.py::test_every_covered_controller_is_equal_bit_for_bit[OSC_POSITION]",
]
MODES = [
    "test_trainer.py::test_vla_equals_standard_on_the_toy[flow-2]",
    "test_ppo.py::test_fresh_data_is_plain_ppo_exactly",
    "test_launch.py::test_a_cut_and_resumed_run_equals_the_uncut_one[1-2-vla]",
    "policies/test_contract.py",
]


def run_tests(names: list[str], **kernels: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in names)]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | kernels, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.sim
@pytest.mark.parametrize("core_type", ["Prescott", "Haswell", "SkylakeX", "Zen"])
def test_the_fast_step_is_robosuites_with_the_kernels_of(core_type):
    run_tests(FAST_STEP, OPENBLAS_CORETYPE=core_type)


@pytest.mark.parametrize(
    ("torch_kernels", "isa"), [("default", "SSE41"), ("avx2", "AVX2")], ids=["without AVX", "with AVX2"]
)
def test_modes_resuming_and_ratios_are_exact_with_the_kernels_of_processors(torch_kernels, isa):
    mkl = "SSE4_2" if isa == "SSE41" else isa
    run_tests(MODES, ATEN_CPU_CAPABILITY=torch_kernels, ONEDNN_MAX_CPU_ISA=isa, MKL_ENABLE_INSTRUCTIONS=mkl)
