"""Check on a GPU what the tests check on a CPU, and measure what only a GPU shows.

    python -m tools.gpu_check                              # everything; eight minutes on an H100 without `vla`
    python -m tools.gpu_check --only weights ratio         # parts of it
    python -m tools.gpu_check --device cpu --quick         # the check itself, in small

Exit code 1 if a check fails, 2 on a machine without CUDA. `--out FILE.md` writes a page as well.

It needs no simulator: torch, tensordict, numpy, pydantic, pyyaml, safetensors and rich, with what those need, and for
`policy.compile: compile` a C++ compiler and, on a GPU, triton. Nothing of asyncflow has to be installed.

Parts: `weights` hunts torn weights, `memory` compares the ring with its plan, `ratio` evaluates fresh rollouts,
`equality` trains in both modes, `inference` times decisions, `profile` both modes, `vla` decisions, updates and both
modes at 0.5 B parameters.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

PACKAGES = ("torch", "tensordict", "numpy", "pydantic", "yaml", "safetensors", "rich")
PARTS = ("weights", "memory", "ratio", "equality", "inference", "profile", "vla")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--quick", action="store_true", help="small policies, few repeats, nothing really compiled")
    parser.add_argument("--commit", help="what the page names, where the code lies outside its repository")
    parser.add_argument("--out", type=Path, help="page to write")
    return parser.parse_args()


def find_obstacle(device: str) -> str | None:
    """Return a line about why nothing can be checked here; None if it can."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return f"gpu_check: needs {', '.join(PACKAGES)}; not installed: {', '.join(missing)}"
    import torch  # noqa: PLC0415 - it might have been missing

    if device == "cuda" and not torch.cuda.is_available():
        return f"gpu_check: torch {torch.__version__} finds no CUDA device here; --device cpu tries the check itself"
    return None


def main() -> int:
    """Run the parts that were asked for, and return the exit code."""
    arguments = parse_arguments()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it before algorithms are deterministic
    obstacle = find_obstacle(arguments.device)
    if obstacle:
        print(obstacle, file=sys.stderr)
        return 2
    from tools.gpu_check.parts import check  # noqa: PLC0415 - what it imports might have been missing

    return check(arguments)
