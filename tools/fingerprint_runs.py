"""Fingerprint short runs of the presets in both modes, to show that a change leaves every bit of them as it was.

    python -m tools.fingerprint_runs --out before.json        # before the change
    python -m tools.fingerprint_runs --against before.json    # after it: exit code 1 names what differs

A fingerprint is a SHA-256 of every tensor in the last checkpoint (weights, optimizer, journal, versions of the
weights) and of the rows of metrics but for those that measure time or memory. Runs go through the command line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

PRESETS = {"toy": 6, "toy_vla_tiny": 3, "lift": 3}  # and how many updates
MODES = ("standard", "vla")
MEASURED = ("time/", "throughput/", "async/", "health/", "wall_s", "buffer/collected", "buffer/in_flight")


def fingerprint(preset: str, mode: str, folder: Path) -> dict[str, str]:
    """Train, and return name -> hash of tensors and metrics."""
    limits = [f"trainer.total_updates={PRESETS[preset]}", "trainer.eval_interval=0"]
    flags = ["--config", preset, "--buffer-type", mode, "--device", "cpu", "--logger", "none", "--out", str(folder)]
    subprocess.run([sys.executable, "-m", "asyncflow", "train", *flags, *limits], check=True, capture_output=True)
    last = folder / "checkpoints" / "last"
    tensors = load_file(last / "policy.safetensors") | load_file(last / "training.safetensors")
    found = {name: _hash(tensor.numpy().tobytes()) for name, tensor in sorted(tensors.items())}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        values = {name: value for name, value in row.items() if not name.startswith(MEASURED)}
        found |= {f"update {row['updates']}: {name}": repr(value) for name, value in values.items()}
    return found


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def differences(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    """Return, a line each, what a run has now and had not before, or the other way round."""
    lines = []
    for run in before.keys() | now.keys():
        old, new = before.get(run, {}), now.get(run, {})
        lines += [f"{run}: {name}" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return sorted(lines)


def main() -> int:
    """Fingerprint, and write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=list(PRESETS), help=f"of {', '.join(PRESETS)}; all by default")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--against", type=Path, help="JSON file to compare with")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {f"{p} {m}": fingerprint(p, m, Path(folder, p, m)) for p in options.presets for m in MODES}
    if options.out:
        options.out.write_text(json.dumps(runs, indent=1, sort_keys=True))
    if options.against is None:
        return 0
    changed = differences(json.loads(options.against.read_text()), runs)
    print("\n".join(changed) or f"{len(runs)} runs are what they were, bit for bit")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
