"""Make `asyncflow/assets/lift_flow.safetensors`, the policy that the `lift` preset fine-tunes.

    OMP_NUM_THREADS=1 python -m tools.make_shipped_weights

It is weak on purpose: the expert misjudges the cube by three centimetres, as a badly calibrated camera would, so its
successful demonstrations still teach a grasp at the cube's edge, which reinforcement learning can put right. The same
arguments give the same file, bit for bit, on one machine; on another one rounding may differ, and with it the success
rate by some points.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from asyncflow.config.presets import load_config
from asyncflow.config.sections import Config, EnvConfig
from asyncflow.demos.pretrain import PretrainOptions, pretrain
from asyncflow.demos.record import DemoOptions, collect_demos
from asyncflow.policies.policy_file import ASSETS
from asyncflow.run.evaluate import EvalResult
from asyncflow.run.evaluate_file import evaluate_checkpoint

ENV = EnvConfig(task="Lift", horizon=120)
DEMOS = DemoOptions(num_demos=20, seed=0, action_noise=0.15, grasp_offset=0.03)
SHIPPED = ASSETS / "lift_flow.safetensors"
PRETRAIN = PretrainOptions(num_steps=600, batch_size=256, learning_rate=1e-3, seed=0, filter_key="all")


def main() -> None:
    """Collect, train, measure and print one line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--eval-episodes", type=int, default=200, help="0: only make the file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and with it the last bits, depends on it
    make_weights(arguments.out)
    if arguments.eval_episodes:
        _report("evaluation", asdict(measure(arguments.out, arguments.eval_episodes)))


def make_weights(out: Path) -> None:
    """Write the policy file; the demonstrations are not kept."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "lift.hdf5"
        _report("demos", asdict(DEMOS) | asdict(collect_demos(ENV, dataset, DEMOS)))
        options = replace(PRETRAIN, overwrite=out == SHIPPED)
        _report("pretrain", asdict(options) | asdict(pretrain(dataset, out, Config(env=ENV), options)))
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    _report("file", {"path": out, "bytes": out.stat().st_size, "sha256": digest})


def measure(path: Path, num_episodes: int) -> EvalResult:
    """Evaluate a policy file as `asyncflow eval` does."""
    return evaluate_checkpoint(str(path), load_config("lift"), num_episodes)


def _report(stage: str, values: dict[str, object]) -> None:
    print(stage, json.dumps(values, default=str), flush=True)


if __name__ == "__main__":
    main()
