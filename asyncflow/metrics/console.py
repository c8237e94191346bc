"""Show a run: a start card, a block per update, an end card; plain lines where the output is no terminal.

It also shows how far a long command is. Metrics appear under the last part of their glossary name, and nothing needs
colour to be understood.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

from rich import box
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from asyncflow import __version__
from asyncflow.config.overrides import write_override
from asyncflow.config.plugins import trusting_words
from asyncflow.config.sections import Config, describe_keys, values_by_key
from asyncflow.metrics.glossary import GLOSSARY, pooled_name
from asyncflow.terminal import LossyFile, command

# The middle line explains asynchrony: who was busy, and how stale the data was.
_BLOCK = {
    "rollout": ("rollout/success_rate", "rollout/num_episodes"),
    "episode": ("rollout/episode_return", "rollout/episode_length"),
    "async": ("async/collector_busy", "async/trainer_busy", "staleness/policy_lag_mean"),
    "train": ("train/approx_kl", "train/clip_fraction", "train/explained_variance"),
    "speed": ("throughput/env_steps_per_s", "time/collect_s", "time/update_s"),
}
_LINE = (
    "rollout/success_rate",
    "rollout/num_episodes",
    "rollout/episode_length",
    "async/collector_busy",
    "async/trainer_busy",
    "staleness/policy_lag_mean",
    "throughput/env_steps_per_s",
    "train/approx_kl",
    "train/explained_variance",
)
_SUMMARY = ("updates", "env_steps", "wall_s", *_BLOCK["rollout"], *_BLOCK["async"])
_BYTES_PER_UNIT = 1000
MAX_TASKS = 4  # of which an update names each


class Score(Protocol):
    """How good a policy is at one task, or at all of them."""

    @property
    def num_episodes(self) -> int:
        """Episodes run."""

    @property
    def num_successes(self) -> int:
        """Episodes that solved the task."""

    @property
    def success_rate(self) -> float:
        """Their quotient."""

    @property
    def success_low(self) -> float:
        """Lower end of its 95 % interval."""

    @property
    def success_high(self) -> float:
        """Upper end."""

    @property
    def episode_length(self) -> float:
        """Mean env steps of an episode."""

    @property
    def episode_return(self) -> float:
        """Mean undiscounted return of an episode."""

    @property
    def num_start_states(self) -> int:
        """Start states that the episodes took in turn; 0: each drew its own."""

    @property
    def num_broken(self) -> int:
        """Episodes that were lost, and do not count."""


class TaskScore(Score, Protocol):
    """How good it is at one of several tasks."""

    @property
    def name(self) -> str:
        """The task's."""


class Evaluation(Score, Protocol):
    """The part of an evaluation's result that is shown."""

    @property
    def has_success(self) -> bool:
        """Whether the task has a notion of success. If not, only returns tell how good a policy is."""

    @property
    def wall_s(self) -> float:
        """Seconds it took."""

    @property
    def tasks(self) -> Sequence[TaskScore]:
        """Each task's, where they are several."""


class ConsoleReporter:
    """Tells whoever watches how a run goes. Main thread only."""

    def __init__(self, file: TextIO | None = None) -> None:
        """Write to `file`, standard output by default."""
        self._file = file or sys.stdout
        self._is_terminal = self._file.isatty()
        self._console = Console(file=self._file, highlight=False)
        self._config: Config | None = None
        self._evaluation_s = 0.0  # what the last one took

    def start(self, config: Config, run_dir: Path, ring_bytes: int, device: str) -> None:
        """Show what is about to run and what differs from the defaults."""
        self._config = config
        rows = {
            "run folder": str(run_dir),
            "task": _describe_env(config),
            "mode": _describe_mode(config),
            "policy": f"{config.policy.kind} from {config.policy.checkpoint or 'scratch'}, on {device}",
            "ring": f"{format_bytes(ring_bytes)} for {config.buffer.buffer_size} decisions a rollout",
            "length": _describe_length(config),
        }
        changed = [write_override(key, value) for key, value, default in differences(config) if value != default]
        self._card(f"asyncflow {__version__}", rows | {"not default": " ".join(changed) or "nothing"})

    def update(self, row: Mapping[str, float]) -> None:
        """Show one finished update; `row` holds metrics by their glossary names."""
        if not self._is_terminal:
            words = [*self._progress(row), *(_named(name, row) for name in _LINE if name in row)]
            self._print(" ".join([*words, *_describe_tasks(row)]))
            return
        self._show(Text("  ".join(self._progress(row)), style="bold"))
        for label, names in _BLOCK.items():
            words = [f"{_named(name, row):<21}" for name in names]
            self._print(f"  {label:<8}{' '.join(words).rstrip()}")
        if tasks := _describe_tasks(row):
            self._print(f"  {'tasks':<8}{' '.join(tasks)}")

    def evaluation(self, updates: int, result: Evaluation) -> None:
        """Show an evaluation made after `updates` updates."""
        self._evaluation_s = result.wall_s
        if not self._is_terminal:
            self._print(f"evaluation after update {updates}: {describe_evaluation(result)}")
        else:
            self._print(f"  eval    {_describe_score(result, result.has_success)}, {result.num_episodes} episodes")
        for line in describe_tasks(result):
            self._print(f"          {line}")

    def end(self, run_dir: Path, checkpoint: Path, row: Mapping[str, float], is_stopped: bool) -> None:
        """Show how the run ended and the command that comes next."""
        rows = {_short(name): format_metric(name, row[name]) for name in _SUMMARY if name in row}
        if "eval/success_rate" in row:
            interval = (row["eval/success_low"], row["eval/success_high"])
            rows["evaluation"] = _describe_rate(row["eval/success_rate"], *interval)
        elif "eval/episode_return" in row:
            rows["evaluation"] = f"episode_return {row['eval/episode_return']:.4g}"
        rows["checkpoint"] = str(checkpoint)
        if self._config is None or self._config.logging.logger == "tensorboard":
            rows["curves"] = command("--logdir", run_dir, program="tensorboard")
        self._card("stopped, and saved" if is_stopped else "finished", rows)
        words: list[str | Path] = ["train", "--resume", run_dir]
        if not is_stopped:
            words = ["eval", checkpoint, "--num-episodes", "200"]
        if self._config is not None:
            env, model_class = self._config.env, self._config.policy.vla.model_class
            if env.python is not None:
                words += [f"env.python={env.python}"] if is_stopped else ["--python", env.python]
            words += trusting_words(model_class, env.tasks or [env.task])
        self._print(f"next: {command(*words)}")  # outside the card, to be copied

    def notice(self, text: str) -> None:
        """Show one line."""
        self._print(text)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Show a table; tab-separated lines where the output is no terminal."""
        if not self._is_terminal:
            for row in [columns, *rows]:
                self._print("\t".join(row))
            return
        table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        table.columns[0].no_wrap = True
        for row in rows:
            table.add_row(*(Text(cell, overflow="fold") for cell in row))
        self._show(table)

    def _progress(self, row: Mapping[str, float]) -> list[str]:
        """Return the words that say how far the run is."""
        updates, env_steps = int(row.get("updates", 0)), int(row.get("env_steps", 0))
        limit = self._config.trainer.total_updates if self._config else None
        words = [f"update {updates}" + (f"/{limit}" if limit else ""), f"env_steps {env_steps}"]
        share = progress_share(self._config, updates, env_steps) if self._config else 0.0
        if share and "wall_s" in row:
            eta_s = row["wall_s"] * (1 - share) / share + self._evaluations_left(updates, share) * self._evaluation_s
            words += [f"wall_s {row['wall_s']:.0f}", f"eta {format_duration(eta_s)}"]
        return words

    def _evaluations_left(self, updates: int, share: float) -> int:
        """Return how many evaluations follow: one an interval and one at the end."""
        assert self._config is not None  # it gave the share
        interval, total = self._config.trainer.eval_interval, round(updates / share)
        return math.ceil(total / interval) - updates // interval if interval and updates < total else 0

    def _card(self, title: str, rows: Mapping[str, str]) -> None:
        if not self._is_terminal:
            self._print(title)
            for name, value in rows.items():
                self._print(f"  {name}: {value}")
            return
        grid = Table.grid(padding=(0, 2))
        for name, value in rows.items():
            grid.add_row(name, Text(value, overflow="fold"))
        self._show(Panel(grid, title=title, title_align="left"))

    def _print(self, line: str) -> None:
        # Not rich's print: it wraps lines, and a pipe needs every line at once.
        with contextlib.suppress(OSError):  # a full disk or a reader that left ends no run
            print(line, file=self._file, flush=True)

    def _show(self, renderable: RenderableType) -> None:
        with contextlib.suppress(OSError):
            self._console.print(renderable)


@contextlib.contextmanager
def progress_bar(what: str, total: int, file: TextIO | None = None) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how much of a long command is done, and erase it at the end; nothing elsewhere.

    Args:
        what: What is counted.
        total: How many there will be.
        file: Where it is shown, standard error by default.

    Yields:
        What to call with the number that is done.
    """
    file = file or sys.stderr
    if not file.isatty() or os.environ.get("TERM") == "dumb":  # rich would also obey FORCE_COLOR
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(file=cast(TextIO, LossyFile(file)))
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def differences(config: Config) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, value, default) of every key."""
    values = values_by_key(config)
    return [(key, values[key], default) for key, default, _ in describe_keys()]


def progress_share(config: Config, updates: int, env_steps: int) -> float:
    """Return how much of a run is done, 0 to 1, by the limit that is nearer."""
    trainer = config.trainer
    by_updates = updates / trainer.total_updates if trainer.total_updates else 0.0
    by_env_steps = env_steps / trainer.total_env_steps if trainer.total_env_steps else 0.0
    return min(1.0, max(by_updates, by_env_steps))


def format_metric(name: str, value: float) -> str:
    """Return a metric's value as it is shown, by its glossary unit; `-` where it is not finite."""
    if not math.isfinite(value):
        return "-"
    name = pooled_name(name)
    unit = GLOSSARY[name].unit if name in GLOSSARY else "1"  # an auxiliary loss of the user's own
    if unit == "fraction":
        return f"{100 * value:.1f}%"
    if unit == "bytes":
        return format_bytes(value)
    if unit in ("s", "1/s"):
        return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
    text = f"{int(value)}" if float(value).is_integer() else f"{value:.3g}"
    return text.replace("e+0", "e").replace("e-0", "e-")


def format_bytes(count: float) -> str:
    """Return a number of bytes with three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < _BYTES_PER_UNIT:
            return f"{count:.3g} {unit}"
        count /= _BYTES_PER_UNIT
    return f"{count:.3g} TB"


def format_duration(seconds: float) -> str:
    """Return seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe_evaluation(result: Evaluation) -> str:
    """Return an evaluation in a line that ends with the number of episodes."""
    count = f"{result.num_successes} of exactly" if result.has_success else "exactly"
    return (
        f"{_describe_score(result, result.has_success)}, episode_length {result.episode_length:.1f}, "
        f"{_describe_starts(result)}wall_s {result.wall_s:.1f}, {count} {result.num_episodes} episodes"
    )


def describe_tasks(result: Evaluation) -> list[str]:
    """Return a line about each of several tasks."""
    scores = [(task, _describe_score(task, result.has_success)) for task in result.tasks]
    return [f"{task.name}: {score}, {_describe_starts(task)}{task.num_episodes} episodes" for task, score in scores]


def _describe_starts(result: Score) -> str:
    """Return how often each start state was taken, where a benchmark keeps some."""
    if not result.num_start_states:
        return ""
    times, rest = divmod(result.num_episodes, result.num_start_states)
    often = f"{times} to {times + 1} times" if rest else "once" if times == 1 else f"{times} times"
    if result.num_broken:
        often += f", but for {result.num_broken} lost with a simulator"
    return f"each of {result.num_start_states} start states {often}, "


def _describe_tasks(row: Mapping[str, float]) -> list[str]:
    """Return the success rate of each task in a rollout, or their return; of many the lowest and the highest."""
    for metric in ("rollout/success_rate", "rollout/episode_return"):
        rates = {name: value for name, value in row.items() if name.startswith(f"{metric}/")}
        words = [f"{name.removeprefix(f'{metric}/')} {format_metric(name, rates[name])}" for name in rates]
        if len(words) <= MAX_TASKS and words:
            return words
        if words:
            ranked = [word for _, word in sorted(zip(rates.values(), words, strict=True))]
            return ["lowest", ranked[0], "highest", ranked[-1]]
    return []


def _describe_score(result: Score, has_success: bool) -> str:
    if not has_success:
        return f"episode_return {result.episode_return:.4g}"
    return f"success_rate {_describe_rate(result.success_rate, result.success_low, result.success_high)}"


def _describe_rate(rate: float, low: float, high: float) -> str:
    return f"{100 * rate:.1f}% (95% interval {100 * low:.1f}% to {100 * high:.1f}%)"


def _named(name: str, row: Mapping[str, float]) -> str:
    return f"{_short(name)} {format_metric(name, row.get(name, math.nan))}"


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _describe_env(config: Config) -> str:
    tasks = f" ({len(config.env.tasks)} tasks)" if config.env.tasks else ""
    return f"{config.env.task_label}{tasks}, {config.env.num_envs} environments"


def _describe_mode(config: Config) -> str:
    overlap = "while training" if config.max_policy_lag else "and waits for each update"
    how = {
        "vla": f"asynchronous (vla): collects in a thread {overlap}",
        "standard": "synchronous (standard): collects, then trains",
    }
    return f"{how[config.trainer.buffer_type]}, lag at most {config.max_policy_lag} ({config.buffer.lag_mode})"


def _describe_length(config: Config) -> str:
    limits = {"updates": config.trainer.total_updates, "env_steps": config.trainer.total_env_steps}
    return " or ".join(f"{limit} {name}" for name, limit in limits.items() if limit)
