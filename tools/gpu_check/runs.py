"""Train on a GPU and check the result: equal modes, a ratio of 1, a ring of the planned size.

Shapes: T decisions, N environments.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from asyncflow.config.presets import load_config
from asyncflow.config.sections import CompileMode, Config
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.metrics.console import format_bytes
from asyncflow.metrics.glossary import is_timing
from asyncflow.policies import Policy, make_policy
from asyncflow.rollout.plan import plan_ring
from asyncflow.rollout.ring import RolloutRing
from asyncflow.run.build import build_trainer
from asyncflow.run.evaluate import EvalResult
from asyncflow.run.launch import train
from asyncflow.run.recorded import RecordedRun
from asyncflow.simulators.spec import EnvSpec
from tools.bench.common.report import Finding
from tools.bench.policies.inference import modes_on

TOY, WIDE = "toy", "wide flow"
NUM_UPDATES, NUM_PLACES = 4, 10
RATIO_TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}
"""Of the ratio before any step: matrix products of other heights, and compiled kernels, round differently."""
EQUAL_TOLERANCE = 1e-4
"""Largest difference of a weight after `NUM_UPDATES` updates, where a device has no deterministic algorithms."""

_RUN = {"env.task": "Toy", "trainer.eval_interval": 0, "trainer.save_interval": 1000, "logging.logger": "none"}
_WIDE = _RUN | {
    "policy.kind": "flow",
    "policy.horizon": 4,
    "policy.n_action_steps": 4,
    "policy.log_prob": "joint_mean",
    "algorithm.learning_rate": 1e-5,
    "algorithm.critic_learning_rate": 1e-5,
    "algorithm.critic_warmup_updates": 0,
}
_WIDE_FULL = {
    "env.num_envs": 256,
    "buffer.buffer_size": 256 * 8,
    "policy.hidden_sizes": [4096] * 3,
    "policy.critic_hidden_sizes": [1024] * 2,
    "policy.num_inference_steps": 24,
    "algorithm.num_minibatches": 8,
    "algorithm.update_epochs": 1,
}
_WIDE_QUICK = {
    "env.num_envs": 8,
    "buffer.buffer_size": 8 * 4,
    "policy.hidden_sizes": [64] * 3,
    "policy.critic_hidden_sizes": [32],
    "algorithm.num_minibatches": 2,
    "algorithm.update_epochs": 1,
}
_TOY_QUICK = {"env.num_envs": 4, "buffer.buffer_size": 32}


@dataclass(frozen=True)
class Scale:
    """Where the check runs, and how much of it.

    Attributes:
        device: Of everything.
        is_quick: Small policies and few repeats, to try the check itself.
    """

    device: torch.device
    is_quick: bool

    @property
    def modes(self) -> list[CompileMode]:
        """What `policy.compile` can be here."""
        return modes_on(self.device)

    def config(self, policy: str, **changes: Any) -> Config:
        """Return a configuration of a policy; `changes` are keys with `__` for the dot."""
        if policy == TOY:
            values = _RUN | (_TOY_QUICK if self.is_quick else {})
        else:
            values = _WIDE | (_WIDE_QUICK if self.is_quick else _WIDE_FULL)
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        return load_config("toy", values | {"trainer.device": str(self.device)})


@contextmanager
def cheap_weights() -> Iterator[None]:
    """Begin with scaled normal weights: orthogonal ones of this width take a processor many seconds each time."""

    def scaled_normal(weight: Tensor, gain: float = 1.0) -> Tensor:
        return torch.nn.init.normal_(weight, std=gain / weight.shape[1] ** 0.5)

    with mock.patch.object(torch.nn.init, "orthogonal_", scaled_normal):
        yield


def new_policy(config: Config, device: torch.device) -> tuple[Policy, EnvSpec]:
    """Return a configuration's policy on a device, and what it fits."""
    spec = ToyVecEnv(1, 1).spec
    return make_policy(config.policy, spec, config.trainer.seed).to(device), spec


# Both modes.


@dataclass
class Outcome:
    """Everything of a run that must not depend on its mode; the reporter of that run, too."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)
    peak_bytes: float = 0.0
    _buffer: RolloutRing | None = None

    def start(self, config: Config, run_dir: Path, ring_bytes: int, device: str) -> None:
        """Nothing to do."""

    def update(self, row: dict[str, float]) -> None:
        """Keep what is no timing, and where the ring lies."""
        assert self._buffer is not None  # `record` was called
        self.rows.append({name: value for name, value in row.items() if not is_timing(name)})
        self.places.append([tensor.data_ptr() for tensor in _ring_tensors(self._buffer)])
        self.peak_bytes = row["health/gpu_bytes"]

    def evaluation(self, updates: int, result: EvalResult) -> None:
        """Nothing is evaluated."""

    def notice(self, text: str) -> None:
        """Nothing to do."""

    def end(self, run_dir: Path, checkpoint: Path, row: dict[str, float], is_stopped: bool) -> None:
        """Nothing to do."""

    def record(self, run: RecordedRun) -> None:
        """Keep every rollout as it is trained on."""
        self._buffer = run.trainer.channel.buffer
        update = run.trainer.ppo.update

        def record_and_update(rollout: Any, *arguments: Any) -> dict[str, float]:
            self.versions.append(rollout.policy_version)
            for name, value in (*rollout.data.items(), *rollout.obs.items()):
                self.tensors[f"rollout {rollout.index}, {name}"] = value.clone()
            return update(rollout, *arguments)

        vars(run.trainer.ppo)["update"] = record_and_update


def train_once(config: Config) -> Outcome:
    """Train a run in a folder that is removed, and return what became of it."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="asyncflow_gpu_check_") as folder:
        values = config.model_copy(update={"logging": config.logging.model_copy(update={"out": f"{folder}/run"})})
        trainer = train(values, outcome, outcome.record).trainer
    outcome.tensors |= {f"weight {name}": p.detach().clone() for name, p in trainer.policy.named_parameters()}
    outcome.tensors |= {f"optimizer {name}": x.clone() for name, x in trainer.ppo.state_tensors().items()}
    return outcome


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Use algorithms that always round alike, and say on stderr where there are none."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(device.type == "cuda", warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check_equality(scale: Scale) -> Iterator[Finding]:
    """Train both policies in both modes with every lag, and compiled and captured with a lag of 1."""
    cases: list[tuple[str, int, CompileMode]] = [(name, lag, "none") for name in (TOY, WIDE) for lag in (0, 1, 2)]
    cases += [(TOY, 1, mode) for mode in scale.modes[1:]]
    cases += [(WIDE, 1, mode) for mode in scale.modes[2:]]
    for name, lag, mode in cases:
        with deterministic(scale.device):
            vla, standard = (
                train_once(_case(scale, name, lag, mode, buffer_type)) for buffer_type in ("vla", "standard")
            )
        yield compare(f"{_title(name, mode)}, L = {lag}: vla equals standard", vla, standard, lag)


def _title(name: str, mode: CompileMode) -> str:
    return name if mode == "none" else f"{name}, policy.compile={mode}"


def _case(scale: Scale, name: str, lag: int, mode: CompileMode, buffer_type: str) -> Config:
    changes = {"policy__compile": mode, "buffer__max_policy_lag": lag, "trainer__buffer_type": buffer_type}
    return scale.config(name, trainer__total_updates=NUM_UPDATES, **changes)


def compare(what: str, vla: Outcome, standard: Outcome, lag: int) -> Finding:
    """Compare weights, optimizer state, trained rollouts, metrics and versions; on a CPU bit for bit."""
    versions = [max(0, n - lag) for n in range(NUM_UPDATES)]
    is_same_shape = vla.tensors.keys() == standard.tensors.keys() and vla.versions == standard.versions == versions
    pairs = [(name, x, standard.tensors.get(name, x)) for name, x in vla.tensors.items()]
    differing = [name for name, a, b in pairs if not torch.equal(a, b)]
    numbers = f"{len(pairs)} tensors, {len(vla.rows)} rows of metrics"
    if is_same_shape and not differing and vla.rows == standard.rows:
        return Finding(what, f"bit for bit: {numbers}", "equal", True)
    is_cuda = all(tensor.is_cuda for _, tensor, _ in pairs)
    weights = [(a - b).abs().max() for name, a, b in pairs if name.startswith("weight")]
    largest = float(torch.stack(weights).max())
    found = f"{len(differing)} of {numbers} differ, first {(*differing, 'the metrics')[0]}; a weight by {largest:.1e}"
    is_close = is_same_shape and is_cuda and largest <= EQUAL_TOLERANCE
    return Finding(what, found, f"equal{f', or weights within {EQUAL_TOLERANCE:g}' if is_cuda else ''}", is_close)


# Before any step.


def check_ratio(scale: Scale) -> Iterator[Finding]:
    """Collect a rollout in the collector's thread and evaluate it with the same weights in this one."""
    tolerance = RATIO_TOLERANCE[scale.device.type]
    for name in (TOY, WIDE):
        for mode in scale.modes:
            config = scale.config(name, policy__compile=mode, trainer__buffer_type="vla", buffer__max_policy_lag=1)
            error = _ratio_error(config)
            what = f"{_title(name, mode)}: largest distance of the ratio from 1 before any step"
            yield Finding(what, f"{error:.1e}", f"<= {tolerance:g}", error <= tolerance)


def _ratio_error(config: Config) -> float:
    trainer = build_trainer(config)
    try:
        trainer.collecting.open(trainer.progress)
        rollout = trainer.collecting.next_rollout()
        batch = rollout.data.clone()
        batch["obs"] = rollout.obs[:-1].clone()
        batch = batch.flatten(0, 1)
        piece = len(batch) // config.algorithm.num_minibatches
        with torch.no_grad():
            again = torch.cat([trainer.policy.default_forward(part)["log_probs"] for part in batch.split(piece)])
        return float(((again - batch["log_probs"]).exp() - 1).abs().max())
    finally:
        trainer.close()


# Memory.


def check_memory_plan(scale: Scale) -> Iterator[Finding]:
    """Allocate the rings of both policies and compare with their plans; then train one and look where it lies."""
    for name in (TOY, WIDE):
        config = scale.config(name, buffer__max_policy_lag=2)
        policy, spec = new_policy(config, scale.device)
        plan = plan_ring(policy, spec, config.env.num_envs, config.num_steps, num_slots=3)
        gc.collect()  # what earlier checks left must not be freed between the two readings
        before = _requested_bytes(scale.device)
        buffer = RolloutRing(plan, scale.device)
        if scale.device.type == "cuda":
            allocated = _requested_bytes(scale.device) - before
        else:
            allocated = sum(x.untyped_storage().nbytes() for x in _ring_tensors(buffer))
        what = f"{name}, L = 2: bytes of the ring, allocated against planned"
        shown = f"{allocated:,} of {plan.num_bytes:,} ({format_bytes(plan.num_bytes)})"
        yield Finding(what, shown, "the same", allocated == plan.num_bytes)
    yield _check_ring_stays(scale)


def _requested_bytes(device: torch.device) -> int:
    """Return what was asked of CUDA's allocator and is in use; it rounds up itself."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device)["requested_bytes.all.current"])


def _ring_tensors(buffer: RolloutRing) -> list[Tensor]:
    return list(buffer.memory.flatten_keys().values())


def _check_ring_stays(scale: Scale) -> Finding:
    if scale.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(scale.device)
    outcome = train_once(scale.config(WIDE, trainer__total_updates=NUM_PLACES, trainer__buffer_type="vla"))
    is_in_place = len(outcome.places) == NUM_PLACES and all(place == outcome.places[0] for place in outcome.places)
    shown = f"{'in place' if is_in_place else 'moved'}; peak on the device {format_bytes(int(outcome.peak_bytes))}"
    return Finding(f"{WIDE}: the ring through {NUM_PLACES} updates of vla", shown, "in place", is_in_place)
