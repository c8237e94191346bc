"""Train every condition on every seed, evaluate the checkpoints, and write one CSV per run for the page.

    python -m tools.bench.learning --out runs/learning --phase train    # on a quiet machine: it takes wall times
    python -m tools.bench.learning --out runs/learning --phase eval     # any time, any machine

Both phases skip what is finished, so an interrupted call is simply made again. A run that was interrupted starts anew;
what it left is renamed.

The lag conditions are synchronous runs with an artificial lag: with `lag_mode: fixed` they end like asynchronous runs
with the same lag, bit for bit, and they do not depend on timing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from asyncflow.config.sections import Config, validate
from asyncflow.devices import resolve_device
from asyncflow.envs import make_vec_env
from asyncflow.envs.base import VecEnv
from asyncflow.envs.mapping import NameMapping, map_names
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import load_into, load_policy_file, resolve_checkpoint
from asyncflow.run.evaluate import EvalResult, evaluate
from asyncflow.run.parts import settle_environment
from asyncflow.seeding import derive_seed
from tools.bench.common.report import REPOSITORY, describe_command, describe_machine, describe_software, set_aside

DATA = REPOSITORY / "docs" / "benchmarks" / "data"
COLUMNS = (
    "updates", "env_steps", "wall_s", "num_episodes", "num_successes", "success_rate", "success_low", "success_high",
    "episode_length",
)  # fmt: skip


def with_lag(lag: int, is_decoupled: bool) -> list[str]:
    """Return the arguments of a synchronous run on data `lag` updates old."""
    objective = f"algorithm.decoupled={str(is_decoupled).lower()}"
    return ["--buffer-type", "standard", f"buffer.max_policy_lag={lag}", objective]


CONDITIONS = {
    "standard": ["--buffer-type", "standard"],
    "vla": ["--buffer-type", "vla"],
    "plain_lag1": with_lag(1, False),
    "decoupled_lag2": with_lag(2, True),
    "plain_lag2": with_lag(2, False),
    "decoupled_lag4": with_lag(4, True),
    "plain_lag4": with_lag(4, False),
}


@dataclass(frozen=True)
class Run:
    """One condition on one seed."""

    condition: str
    seed: int
    root: Path

    @property
    def name(self) -> str:
        """Name of the run's files."""
        return f"learning_{self.condition}_seed{self.seed}"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.root / self.name

    @property
    def marker(self) -> Path:
        """Exists once the training is finished; says how it was made."""
        return self.folder / "finished.json"

    def train_arguments(self, options: argparse.Namespace) -> list[str]:
        """Return what follows `asyncflow train`, without the run folder."""
        fixed = ["trainer.eval_interval=0", f"trainer.save_interval={options.save_interval}", "trainer.keep_last=null"]
        flags = ["--config", options.task_config, "--seed", str(self.seed), "--logger", "none"]
        return [*flags, *CONDITIONS[self.condition], *fixed, *options.override]


# Training.


def train_all(runs: list[Run], options: argparse.Namespace) -> None:
    """Train what is not finished, one run after the other, and describe the setting beside the data.

    Raises:
        SystemExit: A run failed, or the folder holds runs of another experiment or data of another machine.
    """
    software = describe_software()
    meta = read_meta(options, software)
    for run in runs:
        start = time.perf_counter()
        if is_trained(run, options):
            print(f"{run.name}: trained already", flush=True)
        else:
            train_one(run, options, software["commit"])
            clocks = "{updates} updates, {env_steps} env steps, {wall_s:.1f} s".format(**read_metrics(run)[-1])
            print(f"{run.name}: {clocks} of training, {time.perf_counter() - start:.1f} s in all", flush=True)
        meta["commits"][run.name] = json.loads(run.marker.read_text())["commit"]
        meta_path(options).write_text(json.dumps(meta, indent=2) + "\n")


def is_trained(run: Run, options: argparse.Namespace) -> bool:
    """Tell whether the run is finished.

    Raises:
        SystemExit: It is, but with other arguments: it is another experiment.
    """
    if not run.marker.exists():
        return False
    found = json.loads(run.marker.read_text())["arguments"]
    if found != run.train_arguments(options):
        raise SystemExit(f"{run.folder} was trained with other arguments ({' '.join(found)}); choose another --out")
    return True


def train_one(run: Run, options: argparse.Namespace, commit: str) -> None:
    """Train in a process of its own, whose output goes to a log beside the run folder.

    Raises:
        SystemExit: The run failed.
    """
    set_aside(run.folder)  # what an interrupted call left
    run.root.mkdir(parents=True, exist_ok=True)
    arguments, log = run.train_arguments(options), run.root / f"{run.name}.log"
    program = ["-m", "tools.emulated", options.emulate] if options.emulate else ["-m", "asyncflow"]
    command = [sys.executable, *program, "train", "--out", str(run.folder), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=output, check=False)
    if done.returncode:
        raise SystemExit(f"{run.name} ended with exit code {done.returncode}:\n{log.read_text()[-2000:]}")
    run.marker.write_text(json.dumps({"arguments": arguments, "commit": commit}, indent=2))


def meta_path(options: argparse.Namespace) -> Path:
    """Return the file that says where and how the data were measured."""
    options.data.mkdir(parents=True, exist_ok=True)
    path: Path = options.data / "learning_meta.json"
    return path


def read_meta(options: argparse.Namespace, software: dict[str, str]) -> dict[str, Any]:
    """Return what `learning_meta.json` says, with this call's command and versions.

    Raises:
        SystemExit: The data were measured on another machine, so that wall times cannot be compared.
    """
    path, machine = meta_path(options), describe_machine()
    meta: dict[str, Any] = {"machine": machine, "commits": {}, "commands": []}
    if path.exists():
        meta = json.loads(path.read_text())
    if meta["machine"] != machine:
        raise SystemExit(f"{path} was measured on another machine: {meta['machine']}; remove it to start anew")
    commands = meta["commands"] + [describe_command()] * (describe_command() not in meta["commands"])
    versions = {name: version for name, version in software.items() if name != "commit"}
    return meta | {"commands": commands, "versions": versions}


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """Return one row per update."""
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


# Evaluation.


def evaluate_all(runs: list[Run], options: argparse.Namespace) -> None:
    """Evaluate every checkpoint, and copy the finished tables to the data.

    Raises:
        SystemExit: A run is not trained.
    """
    for run in runs:
        if not is_trained(run, options):
            raise SystemExit(f"{run.folder} is not trained; call with --phase train first")
    options.data.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        tables = {run: run.folder / name_table(options) for run in runs}
        missing = [run for run in runs if run.seed == seed and not tables[run].exists()]
        if missing:
            with Evaluator(read_config(missing[0])) as evaluator:
                for run in missing:
                    write_table(tables[run], list(evaluate_run(run, evaluator, options)))
        for run in (run for run in runs if run.seed == seed):
            shutil.copyfile(tables[run], options.data / f"{run.name}.csv")


def name_table(options: argparse.Namespace) -> str:
    """Return the name of a run's finished evaluation, which says what was evaluated."""
    start = f"_from_{options.from_update}" if options.from_update else ""
    return f"evaluation_{options.final_episodes}_{options.curve_episodes}{start}.csv"


def read_config(run: Run) -> Config:
    """Return a run's resolved configuration."""
    return validate(yaml.safe_load((run.folder / "config.yaml").read_text()))


def evaluate_run(run: Run, evaluator: Evaluator, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the row of the start weights, if there are any, and of every checkpoint.

    Raises:
        SystemExit: The metrics do not say what a checkpoint took.
    """
    clocks = {0: {"env_steps": 0, "wall_s": 0.0}} | {row["updates"]: row for row in read_metrics(run)}
    checkpoints = {updates: path for updates, path in find_checkpoints(run).items() if updates >= options.from_update}
    if not checkpoints:
        raise SystemExit(f"{run.folder}: no checkpoint from update {options.from_update} on")
    if unknown := checkpoints.keys() - clocks:
        raise SystemExit(f"{run.folder}: metrics.jsonl has no row of updates {sorted(unknown)}, which were saved")
    for updates, path in checkpoints.items():
        is_last = updates == max(checkpoints)
        result = evaluator.measure(path, options.final_episodes if is_last else options.curve_episodes)
        print(f"{run.name}: update {updates}, {result.num_successes} of {result.num_episodes}", flush=True)
        clock = clocks[updates]
        values = asdict(result) | {name: clock[name] for name in ("env_steps", "wall_s")} | {"updates": updates}
        yield {name: values[name] for name in COLUMNS}


def find_checkpoints(run: Run) -> dict[int, Path]:
    """Return policy files by updates, rising; 0 are the weights that the run started from."""
    start = read_config(run).policy.checkpoint
    found = {0: resolve_checkpoint(start)} if start else {}
    saved = sorted((run.folder / "checkpoints").glob("update_??????"))
    return found | {int(path.name.removeprefix("update_")): resolve_checkpoint(str(path)) for path in saved}


class Evaluator:
    """Evaluates policy files of one seed, on the episodes that a run evaluates itself on; `asyncflow eval` runs others.

    That command builds simulators for one file; here all files share them, which saves most of the time.
    """

    def __init__(self, config: Config) -> None:
        """Build the simulators of a run's evaluations."""
        self._config = config
        self._results: dict[tuple[Path, int], EvalResult] = {}  # every condition starts from the same weights
        seed, num_envs = derive_seed(config.trainer.seed, "evaluation"), config.env.num_envs
        torch.set_num_threads(config.trainer.num_threads)
        env_config = settle_environment(config).env
        env = make_vec_env(env_config, config.policy.n_action_steps, num_envs, seed)
        self._env: VecEnv = map_names(env, NameMapping(config.policy.mapping, env.spec))

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self._env.close()

    def measure(self, path: Path, num_episodes: int) -> EvalResult:
        """Run exactly `num_episodes` episodes, the same ones for every file."""
        key = (path, num_episodes)
        if key not in self._results:
            file, seed, spec = load_policy_file(path), self._config.trainer.seed, self._env.spec
            policy = make_policy(file.policy_config, spec, seed)
            load_into(policy, file)
            policy.to(resolve_device(self._config.trainer.device))
            self._results[key] = evaluate(policy, self._env, num_episodes, seed)
        return self._results[key]


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a CSV with the columns of every learning curve."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()} for row in rows)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the tables")
    parser.add_argument("--phase", choices=("train", "eval", "all"), default="all")
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--task-config", default="lift", help="preset or YAML file")
    parser.add_argument("--emulate", metavar="JSON", help="stages that take longer, as `tools.emulated` takes them")
    parser.add_argument("--override", nargs="*", default=[], metavar="KEY=VALUE", help="for every condition")
    parser.add_argument("--save-interval", type=int, default=4, help="updates between points of a curve")
    parser.add_argument("--final-episodes", type=int, default=200, help="episodes for the last checkpoint")
    parser.add_argument("--curve-episodes", type=int, default=50, help="episodes for the other points")
    parser.add_argument("--from-update", type=int, default=0, help="evaluate no checkpoint before this one")
    return parser.parse_args()


def main() -> int:
    """Train, then evaluate; seeds outside conditions, so that an interrupted call leaves whole comparisons."""
    options = parse_arguments()
    runs = [Run(condition, seed, options.out) for seed in options.seeds for condition in options.conditions]
    if options.phase != "eval":
        train_all(runs, options)
    if options.phase != "train":
        evaluate_all(runs, options)
    return 0
