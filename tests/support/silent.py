"""Small runs, recorded, cut, resumed and compared, and a reporter that keeps what it is told."""

import json

import pytest
import torch

from asyncflow.config.presets import load_config
from asyncflow.metrics.glossary import is_timing
from asyncflow.ppo.ppo import PPO
from asyncflow.run.build import build_trainer
from asyncflow.run.checkpoint import list_checkpoints, load_checkpoint
from asyncflow.run.folder import resume_config
from asyncflow.run.launch import resume, train

TOY = {
    "env.num_envs": 4,
    "buffer.buffer_size": 32,
    "algorithm.update_epochs": 2,
    "trainer.device": "cpu",
    "trainer.total_updates": 6,
    "trainer.eval_interval": 0,
    "logging.logger": "none",
}
LIFT = {
    "env.num_envs": 4,
    "env.num_workers": 2,
    "env.horizon": 10,
    "buffer.buffer_size": 16,
    "algorithm.num_minibatches": 2,
    "algorithm.critic_warmup_updates": 0,
    "trainer.device": "cpu",
    "trainer.total_updates": 4,
    "trainer.eval_interval": 0,
    "logging.logger": "none",
}


# Checkpoints after updates 2 and 4; episodes end within a rollout and are open at the first of them.
LIFT_VLA = LIFT | {
    "env.horizon": 26,
    "buffer.max_policy_lag": 1,
    "trainer.buffer_type": "vla",
    "trainer.save_interval": 2,
}


class Silent:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.rows, self.notices, self.ended = [], [], False

    def start(self, config, run_dir, ring_bytes, device):
        self.ring_bytes = ring_bytes

    def update(self, row):
        self.rows.append(row)

    def evaluation(self, updates, result):
        pass

    def notice(self, text):
        self.notices.append(text)

    def end(self, run_dir, checkpoint, row, is_stopped):
        self.ended = True


def build(config, resumed=None):
    """Return the trainer of a run, its ring allocated."""
    trainer = build_trainer(config, resumed)
    trainer.collecting.set_up(trainer.progress)
    return trainer


def start(folder, preset, changes, stop_at=None, on_built=lambda trainer: None):
    """Train, and request a stop as soon as `stop_at` updates are finished."""
    reporter, trainers = Silent(), []

    def update(row):
        reporter.rows.append(row)
        if row["updates"] == stop_at:
            trainers[0].request_stop()

    reporter.update = update
    config = load_config(preset, changes | {"logging.out": str(folder)})
    train(config, reporter, lambda trainer: (trainers.append(trainer), on_built(trainer)))
    return reporter


def record(folder, preset, changes):
    """Train and return everything computed that must not depend on the mode: tensors, batches, rows."""
    batches, reporter = [], Silent()
    prepare = PPO._prepare

    def keep(self, rollout, version):
        batch = prepare(self, rollout, version)
        batches.append(batch.clone())
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPO, "_prepare", keep)
        done = train(load_config(preset, changes | {"logging.out": str(folder)}), reporter)
    state = done.trainer.ppo.optimizer.state_dict()["state"]
    tensors = [p.detach() for p in done.trainer.policy.parameters()]
    tensors += [value for index in sorted(state) for value in state[index].values()]
    rows = [{k: v for k, v in row.items() if not is_timing(k)} for row in reporter.rows]
    return tensors, batches, rows


def go_on(folder, on_built=lambda trainer: None, **changes):
    reporter = Silent()
    resume(folder, resume_config(folder, changes), reporter, on_built)
    return reporter


def outcome(folder):
    """Return everything of a finished run that must not depend on where it was cut."""
    last = load_checkpoint(list_checkpoints(folder)[-1])
    state = {name: value for name, value in vars(last.state).items() if name not in ("row", "books")}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if not is_timing(name)} for row in rows]
    return last.policy, last.groups, state, rows


def assert_equal(first, second):
    assert first[0].keys() == second[0].keys()
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    assert first[1].keys() == second[1].keys()
    for group in first[1]:
        assert first[1][group].keys() == second[1][group].keys()
        assert all(torch.equal(first[1][group][name], second[1][group][name]) for name in first[1][group])
    assert first[2:] == second[2:]
