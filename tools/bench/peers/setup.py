"""The environment of the peers: what they need beyond asyncflow's own packages, in a folder of its own.

Owns which versions are compared and how they are installed. It must not import any of them: it runs before they exist.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from tools.bench.common.report import REPOSITORY

FOLDER = REPOSITORY / ".venv-peers"
PYTHON = FOLDER / "bin" / "python"
PEERS = ("stable-baselines3", "torchrl", "rsl-rl-lib", "gymnasium")

# Installed without dependencies, so that torch, tensordict and numpy stay those of asyncflow; hence what is small and
# missing is listed too. torchrl 0.14.1, the newest, asks for tensordict < 0.15 and works with 0.15. rsl-rl-lib asks
# for onnx and onnxscript, which it needs for exporting alone, and imports GitPython with its logger.
PACKAGES = (
    "stable-baselines3==2.9.2",
    "gymnasium==1.4.0",
    "farama-notifications==0.0.6",
    "torchrl==0.14.1",
    "hoptorch==0.1.4",
    "rsl-rl-lib==5.5.1",
    "GitPython==3.2.1",
    "gitdb==4.0.12",
    "smmap==5.0.3",
)


def enter_environment() -> None:
    """Run this program again in the environment of the peers, after installing it if it is not there."""
    if Path(sys.prefix) == FOLDER:
        return
    install()
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    os.execve(PYTHON, [str(PYTHON), "-m", "tools.bench.peers", *sys.argv[1:]], variables)


def install() -> None:
    """Make the environment; one that is whole and of these versions stays as it is."""
    packages, stamp = sysconfig.get_path("purelib"), FOLDER / "installed.txt"
    wanted = "\n".join([sys.version, packages, *PACKAGES])
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER], check=True)
    share_packages(packages)
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-deps"]
    subprocess.run([*pip, *PACKAGES], check=True)
    stamp.write_text(wanted)


def share_packages(packages: str) -> None:
    """Let the environment see a folder of packages behind its own, those with a .pth file, as asyncflow, included."""
    place = [str(PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run(place, check=True, capture_output=True, text=True).stdout.strip()
    (Path(own) / "shared.pth").write_text(f"import site; site.addsitedir({packages!r})\n")


def describe_peers() -> str:
    """Return the versions that are compared with."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PEERS)
