"""Equality bit for bit on processors that this machine does not have, whose kernels its libraries can be told to run.

Each case is a Python of its own, because libraries choose their kernels while they are loaded.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FAST_STEP = "envs/test_fast_step.py"
ONE_TASK = "envs/test_fast_step.py::test_every_task_is_equal_bit_for_bit[Lift]"
MODES = (
    "run/test_trainer.py::test_vla_equals_standard_on_the_toy[flow-2]",
    "ppo/test_ppo.py::test_fresh_data_is_plain_ppo_exactly",
    "run/test_launch.py::test_a_cut_and_resumed_run_equals_the_uncut_one[2-1-vla]",
)
MORE_MODES = (
    "run/test_trainer.py::test_vla_equals_standard_with_a_vla_that_sees_pictures",
    "run/test_frozen_backbone.py",
    "policies/test_contract.py",
)
HAS_AVX512 = "avx512f" in Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else False
WITH_AVX512 = pytest.param(
    "SkylakeX",
    marks=pytest.mark.skipif(not HAS_AVX512, reason="this processor has no AVX-512 to run these kernels with"),
)
FAR_APART, OTHERS = ("Prescott", WITH_AVX512), ("Haswell", "Zen")  # without AVX; both with AVX2
CORE_TYPES = FAR_APART + OTHERS
WITHOUT_AVX = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
WITH_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def run_tests(*names: str, **kernels: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in names)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | kernels, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.sim
@pytest.mark.parametrize("core_type", [*FAR_APART, *(pytest.param(other, marks=pytest.mark.slow) for other in OTHERS)])
def test_the_fast_step_is_robosuites_with_the_kernels_of(core_type):
    run_tests(ONE_TASK, OPENBLAS_CORETYPE=core_type)


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.parametrize("core_type", CORE_TYPES)
def test_every_task_and_controller_is_robosuites_and_replays_with_the_kernels_of(core_type):
    run_tests(FAST_STEP, "envs/test_robomimic.py", "envs/test_journal.py", OPENBLAS_CORETYPE=core_type)


def test_modes_and_resuming_are_exact_with_the_kernels_of_a_processor_without_avx():
    run_tests(*MODES, **WITHOUT_AVX)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [WITHOUT_AVX, WITH_AVX2], ids=["without AVX", "with AVX2"])
def test_ratios_batch_shapes_and_pictures_are_exact_with_the_kernels_of(kernels):
    run_tests(*MODES, *MORE_MODES, **kernels)
