"""The command line; the only place that exits.

Exit codes are 0, 1 after a crash, 2 after a user's mistake, and 130 after Ctrl-C or its like. Everything slow (torch,
simulators, pydantic) is imported inside the command that needs it, so that `--help` is fast.
"""
# ruff: noqa: PLC0415  see above

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from asyncflow import __version__, cli_envs
from asyncflow.errors import ConfigError
from asyncflow.files import check_output
from asyncflow.flags import Checkpoint, Overrides, Preset, split
from asyncflow.flags import flag as _flag
from asyncflow.flags import flags as _flags
from asyncflow.signals import EXIT_INTERRUPTED, interrupt_on_signals, stop_on_signals
from asyncflow.terminal import command, complain, crash, explain_usage, find_refusal, finish_streams, prepare_streams

if TYPE_CHECKING:
    from asyncflow.config.sections import Config
    from asyncflow.run.recorded import RecordedRun

_UsageError: type[Any] = typer.BadParameter.__mro__[1]  # click's, which some versions of typer carry inside
_CONFIG_KEYS = {
    "task": "env.task",
    "buffer_type": "trainer.buffer_type",
    "device": "trainer.device",
    "seed": "trainer.seed",
    "num_envs": "env.num_envs",
    "num_workers": "env.num_workers",
    "python": "env.python",
    "checkpoint": "policy.checkpoint",
    "out": "logging.out",
    "logger": "logging.logger",
    "trace": "logging.trace",
}

app = typer.Typer(
    help="Asynchronous PPO fine-tuning of flow-matching robot policies in robosuite.",
    epilog="Start with: asyncflow train --task Toy",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_envs.app, name="envs")
_TRUST_CLASS = _flag(
    "Model's class that the checkpoint or run may have imported, which runs its code; may be repeated.",
    list[str],
    metavar="package.module.Class",
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"asyncflow {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass


@app.command()
@_flags(
    task=_flag("Task; `asyncflow tasks` lists them.", metavar="NAME"),
    buffer_type=_flag(
        "vla, asynchronous: collect while training; standard, synchronous: collect, then train.", metavar="vla|standard"
    ),
    device=_flag("Where to train and infer.", metavar="auto|cpu|cuda|cuda:N"),
    seed=_flag("Seed of the whole run.", int),
    num_envs=_flag("Environments collected from.", int),
    checkpoint=_flag("Weights to start from: a run, checkpoint, file or shipped name.", Path, metavar="PATH|NAME"),
    resume=_flag("Run to go on with, from its newest whole checkpoint.", Path, metavar="FOLDER"),
    out=_flag("Run folder; must not hold a run.", Path, metavar="FOLDER"),
    logger=_flag("Curves beside metrics.jsonl.", metavar="tensorboard|none"),
    trace=_flag("Write trace.json, who did what when, for Perfetto or chrome://tracing.", bool),
    trust_class=_TRUST_CLASS,
)
def train(overrides: Overrides = None, config: Preset = None, **flags: Any) -> int:
    """Fine-tune a policy with PPO, or go on with a run."""
    folder = flags.pop("resume")
    _trust(flags.pop("trust_class"))
    resolved = _load(config, overrides, flags) if folder is None else _load_run(folder, config, overrides, flags)
    from asyncflow.metrics.console import ConsoleReporter

    with _quiet_imports():
        from asyncflow.run import launch

    def on_built(run: RecordedRun) -> None:
        stop_on_signals(run.request_stop)

    reporter = ConsoleReporter()
    try:
        if folder is None:
            done = launch.train(resolved, reporter, on_built)
        else:
            done = launch.resume(Path(folder), resolved, reporter, on_built)
    finally:
        interrupt_on_signals()
    return EXIT_INTERRUPTED if done.is_stopping else 0


@app.command()
@_flags(
    task=_flag("Task; `asyncflow tasks` lists them.", metavar="NAME"),
    device=_flag("Where to train and infer.", metavar="auto|cpu|cuda|cuda:N"),
    seed=_flag("Seed of every run.", int),
    num_envs=_flag("Environments collected from.", int),
    num_workers=_flag("Simulator processes; one per core if not given.", int),
    checkpoint=_flag("Weights to start from: a run, checkpoint, file or shipped name.", Path, metavar="PATH|NAME"),
    inference_latency_s=_flag("Emulated: seconds that a rollout takes longer in the policy.", float, 0.0),
    env_latency_s=_flag("Emulated: seconds that a rollout takes longer in the simulators.", float, 0.0),
    update_latency_s=_flag("Emulated: seconds that an update takes longer.", float, 0.0),
    spread=_flag("How they vary from rollout to rollout.", str, "constant", "constant|uniform|exponential|lognormal"),
    variation=_flag("Their standard deviation over their mean; that of an exponential spread is always 1.", float, 0.5),
    sweep=_flag("Vary the update's latency: training takes 0.1 to 4 times as long as collecting.", bool, False),
    num_repeats=_flag("Times standard, vla, vla, standard; 3 if not given, of a sweep 1.", int),
    num_updates=_flag("Measured updates of a run; some seconds of them if not given.", int),
    out=_flag("Folder to write to; must not hold a profile.", Path, metavar="FOLDER"),
)
def profile(overrides: Overrides = None, config: Preset = None, **flags: Any) -> int:
    """Measure both buffer types in turns: throughput, its ceilings, and what limits it."""
    out, is_sweep, num_repeats = flags.pop("out"), flags.pop("sweep"), flags.pop("num_repeats")
    names = ("inference_latency_s", "env_latency_s", "update_latency_s", "spread", "variation", "num_updates")
    options = {name: flags.pop(name) for name in names} | {"is_sweep": is_sweep}
    resolved = _load(config, overrides, flags)
    from asyncflow.metrics.console import ConsoleReporter

    with _quiet_imports():
        from asyncflow.profile.measure import ProfileOptions
        from asyncflow.profile.report import report_profile

    default = 1 if is_sweep else 3
    options["num_repeats"] = default if num_repeats is None else num_repeats
    report_profile(resolved, ProfileOptions(**options), out, ConsoleReporter())
    return 0


@app.command("eval")
@_flags(
    num_episodes=_flag("Episodes to run.", int, 200),
    seed=_flag("Seed of start states and noise.", int),
    num_envs=_flag("Environments stepped at once.", int),
    num_workers=_flag("Simulator processes; one per core if not given.", int),
    python=_flag("Interpreter that simulates; this one if not given.", metavar="PATH"),
    device=_flag("Where to infer.", metavar="auto|cpu|cuda|cuda:N"),
    trust_class=_TRUST_CLASS,
)
def evaluate(checkpoint: Checkpoint, **flags: Any) -> int:
    """Measure how often a policy succeeds, with a 95 % interval."""
    _trust(flags.pop("trust_class"))
    num_episodes, num_envs = flags.pop("num_episodes"), flags.pop("num_envs")
    for name, number in {"--num-episodes": num_episodes, "--num-envs": num_envs}.items():
        if number is not None and number < 1:
            raise ConfigError(f"{name} {number}: must be at least 1")
    config = _load("lift", None, flags)
    if num_envs is not None:  # no multiple of it is collected, as the configuration of a run would ask
        config = config.model_copy(update={"env": config.env.model_copy(update={"num_envs": num_envs})})
    from asyncflow.metrics.console import describe_evaluation, describe_tasks, progress_bar

    with _quiet_imports():
        from asyncflow.run.evaluate_file import evaluate_checkpoint

    with progress_bar("episodes", num_episodes) as show:
        result = evaluate_checkpoint(checkpoint, config, num_episodes, show)
    for line in describe_tasks(result):
        print(line)
    print(describe_evaluation(result))
    return 0


@app.command()
@_flags(
    task=_flag("Task with a scripted expert.", str, "Lift", "NAME"),
    out=_flag("HDF5 file to write; demos/TASK.hdf5 by default.", Path, metavar="FILE"),
    num_demos=_flag("Successful demonstrations.", int, 10),
    seed=_flag("Seed of start states and noise.", int, 0),
    action_noise=_flag("Standard deviation of the noise on actions.", float, 0.15),
    grasp_offset=_flag("Metres by which the expert misjudges the object.", float, 0.0),
    cameras=_flag("Cameras whose images are recorded, too, such as agentview.", metavar="NAME,NAME"),
    camera_size=_flag("Pixels of what cameras render.", metavar="HEIGHT,WIDTH"),
    point_clouds=_flag("Cameras whose point clouds are recorded, too.", metavar="NAME,NAME"),
    overwrite=_flag("Replace an existing file.", bool, False),
)
def demos(**flags: Any) -> int:
    """Write scripted, noised demonstrations in robomimic's layout."""
    task, out = flags.pop("task"), flags.pop("out")
    from asyncflow.config.overrides import write_value
    from asyncflow.config.presets import load_config
    from asyncflow.metrics.console import progress_bar

    with _quiet_imports():
        from asyncflow.demos.record import DemoOptions, collect_demos

    seen = {name: split(flags.pop(name)) for name in ("cameras", "camera_size", "point_clouds")}
    env_config = load_config(None, {"env.task": task} | {f"env.{k}": v for k, v in seen.items() if v}).env
    with progress_bar("demonstrations", flags["num_demos"]) as show:
        result = collect_demos(env_config, out or f"demos/{task.lower()}.hdf5", DemoOptions(**flags), on_progress=show)
    print(
        f"{result.path}: {result.num_demos} demonstrations, {result.num_steps} env steps, "
        f"{result.num_failures} failed attempts left out, {result.wall_s:.1f} s"
    )
    cameras = {"cameras": env_config.cameras, "point_clouds": env_config.point_clouds}
    keys = [f"env.{key}={write_value(list(names))}" for key, names in cameras.items() if names]
    print(f"next: {command('pretrain', '--dataset', result.path, *keys)}")
    return 0


@app.command()
@_flags(
    dataset=_flag("robomimic HDF5 file, such as `asyncflow demos` writes.", Path, metavar="FILE"),
    out=_flag("Policy file to write; DATASET.safetensors by default.", Path, metavar="FILE"),
    num_steps=_flag("Optimiser steps.", int, 1000),
    batch_size=_flag("Chunks in a batch.", int, 256),
    learning_rate=_flag("Adam step size.", float, 1e-3),
    seed=_flag("Seed of weights, batches and noise.", int, 0),
    max_shift=_flag("Pixels by which images are shifted at random, at most.", int, 4),
    overwrite=_flag("Replace an existing file.", bool, False),
    filter_key=_flag("Train on mask/KEY, or on all; by default on mask/train, or all but mask/valid.", metavar="KEY"),
    only_successes=_flag("Leave out demonstrations that never succeed.", bool, False),
)
def pretrain(overrides: Overrides = None, config: Preset = None, **flags: Any) -> int:
    """Train a policy with a velocity field on demonstrations, by flow matching."""
    dataset, out = flags.pop("dataset"), flags.pop("out")
    if dataset is None:
        raise ConfigError("--dataset FILE is missing; `asyncflow demos` writes one")
    from asyncflow.config.presets import load_config, parse_overrides
    from asyncflow.metrics.console import progress_bar
    from asyncflow.run.start import start_from

    resolved = load_config(config, parse_overrides(overrides or []))  # without a preset: the dataset names its task
    with _quiet_imports():
        from asyncflow.demos.pretrain import PretrainOptions, pretrain

    out = out or f"{os.path.splitext(dataset)[0]}.safetensors"
    check_output(Path(out), flags["overwrite"], inputs=[dataset, config])
    options = PretrainOptions(**flags)
    with progress_bar("optimiser steps", options.num_steps) as show:
        result = pretrain(dataset, out, resolved, options, show)
    print("\n".join(result.describe()))
    print(f"next: {command('train', *start_from(config, overrides or [], result.path, result.env_keys))}")
    return 0


@app.command()
def tasks() -> int:
    """List the tasks."""
    from asyncflow.config.libero import LIBERO_SUITES
    from asyncflow.config.plugins import ENVS, plugin_names
    from asyncflow.config.suites import SUITES
    from asyncflow.config.task_table import MIMICGEN, TASKS
    from asyncflow.config.tasks import TOYS
    from asyncflow.metrics.console import ConsoleReporter

    rows = [[name, "-", summary] for name, summary in TOYS.items()]
    rows += [
        [name, "-", f"a suite: {', '.join(members)}"] for name, members in SUITES.items() if name not in LIBERO_SUITES
    ]
    rows += [[name, str(task.horizon), task.summary] for name, task in TASKS.items()]
    rows += [[name, "-", "registered by an installed package"] for name in plugin_names(ENVS)]
    libero = [[f"{n}/0 to {s.num_tasks - 1}, or {n}: all", str(s.horizon), s.summary] for n, s in LIBERO_SUITES.items()]
    mimicgen = [[name, str(task.horizon), task.summary] for name, task in MIMICGEN.items()]
    for heading, listed in (("task", rows), ("task of LIBERO", libero), ("task of MimicGen", mimicgen)):
        ConsoleReporter().table([heading, "horizon", "what the robot has to do"], listed)
    return 0


@app.command()
def config(overrides: Overrides = None, config: Preset = None) -> int:
    """Show every key: its value in a run, its default and its meaning."""
    resolved = _load(config, overrides, {})
    from asyncflow.config.overrides import write_value
    from asyncflow.config.sections import describe_keys, values_by_key
    from asyncflow.metrics.console import ConsoleReporter

    values = values_by_key(resolved)
    rows = [[key, write_value(values[key]), write_value(default), meaning] for key, default, meaning in describe_keys()]
    ConsoleReporter().table(["key", "value", "default", "meaning"], rows)
    return 0


def _trust(paths: list[str] | None) -> None:
    from asyncflow.config.plugins import trust_class

    for path in paths or []:
        trust_class(path)


def _load(preset: str | None, overrides: list[str] | None, flags: dict[str, Any]) -> Config:
    """Return the configuration that a command line means; overrides win over flags, both over the preset."""
    from asyncflow.config.presets import load_config, parse_overrides
    from asyncflow.config.tasks import task_names
    from asyncflow.run.start import choose_preset, name_task

    given = {_CONFIG_KEYS[name]: value for name, value in flags.items() if value is not None}
    given |= parse_overrides(overrides or [])
    values = name_task(preset, given)
    if preset is None and (values is given or "env.tasks" in values or values["env.task"] in task_names()):
        preset = choose_preset(values)
    return load_config(preset, values)


def _load_run(folder: str, preset: str | None, overrides: list[str] | None, flags: dict[str, Any]) -> Config:
    """Return the configuration with which a run goes on."""
    from asyncflow.config.presets import parse_overrides
    from asyncflow.run.folder import resume_config

    if preset is not None:
        raise ConfigError(f"--config {preset}: a resumed run keeps its own configuration; leave --config out")
    values = {_CONFIG_KEYS[name]: value for name, value in flags.items() if value is not None}
    return resume_config(Path(folder), values | parse_overrides(overrides or []))


@contextmanager
def _quiet_imports() -> Iterator[None]:
    """Drop the warnings that simulators and their dependencies emit while they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code."""
    try:
        return app(arguments or ["--help"], prog_name="asyncflow", standalone_mode=False) or 0
    except ConfigError as error:
        return complain(str(error))
    except _UsageError as error:
        return complain(explain_usage(error))
    except (KeyboardInterrupt, typer.Abort) as error:
        cause = error.__cause__  # click takes an EOFError for a user's Ctrl-D
        return crash(cause) if isinstance(cause, EOFError) else EXIT_INTERRUPTED
    except (Exception, SystemExit) as error:
        refusal = find_refusal(error)
        return complain(refusal) if refusal else crash(error)


def main() -> NoReturn:
    """Entry point of the `asyncflow` command."""
    prepare_streams()
    interrupt_on_signals()
    code = run(sys.argv[1:])
    finish_streams()
    sys.exit(code)
