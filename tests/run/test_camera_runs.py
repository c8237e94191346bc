"""Runs on what cameras yield: the same function of configuration and seed in both modes and across a cut."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from silent import LIFT, TOY, assert_equal, go_on, outcome, start
from test_trainer import assert_same, run
from torch import Tensor

from asyncflow.envs.toy import point_cloud, render
from asyncflow.policies import FlowPolicy


class Seen(NamedTuple):
    """A kind of observation: its name, the toy with it, its type there, and how the toy's states look."""

    kind: str
    task: str
    dtype: torch.dtype
    show: Callable[[Tensor], Tensor]
    lift_preset: str
    lift: dict[str, Any]

    @property
    def toy(self) -> dict[str, Any]:
        """A short run of the toy."""
        return TOY | {"env.task": self.task, "policy.kind": "flow", "policy.hidden_sizes": [32]}


SMALL_POLICY = {"policy.checkpoint": None, "policy.hidden_sizes": [32], "policy.critic_hidden_sizes": [16]}
SMALL_LIFT = LIFT | SMALL_POLICY | {"env.num_envs": 2, "buffer.buffer_size": 8}
CLOUD = {"env.point_clouds": ["agentview"], "env.camera_size": [48, 48]}
IMAGES = Seen("images", "ToyImages", torch.uint8, render, "lift_image", {"env.camera_size": [24, 20]})
POINTS = Seen("points", "ToyPoints", torch.float32, point_cloud, "lift", CLOUD)


@pytest.fixture(params=[IMAGES, POINTS], ids=lambda seen: seen.kind)
def seen(request) -> Seen:
    return request.param


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("kind", ["flow", "gaussian"])
def test_vla_equals_standard(tmp_path, seen, kind, lag):
    changes = seen.toy | {"policy.kind": kind, "buffer.max_policy_lag": lag, "trainer.total_updates": 4}
    vla = run(tmp_path, "toy", changes | {"trainer.buffer_type": "vla"})
    standard = run(tmp_path, "toy", changes | {"trainer.buffer_type": "standard"})
    assert vla[1]
    assert all(batch["obs", seen.kind, "top"].dtype == seen.dtype for batch in vla[1])
    assert_same(vla, standard)


def test_every_minibatch_shows_what_cameras_saw_of_its_own_states(tmp_path, monkeypatch, seen):
    is_shown = []
    default_forward = FlowPolicy.default_forward

    def watch(policy, batch):
        is_shown.append(torch.equal(batch["obs", seen.kind, "top"], seen.show(batch["obs", "state"])))
        return default_forward(policy, batch)

    monkeypatch.setattr(FlowPolicy, "default_forward", watch)
    changes = {"algorithm.num_minibatches": 4, "buffer.max_policy_lag": 1, "trainer.total_updates": 2}
    start(tmp_path / "run", "toy", seen.toy | changes)
    num_first, num_proximal = 1, 4  # before the first update; of the second one, whose data is stale
    assert is_shown == [True] * (num_first + 2 * 2 * 4 + num_proximal)


@pytest.mark.parametrize("buffer_type", ["standard", "vla"])
def test_a_cut_and_resumed_run_equals_the_uncut_one(tmp_path, seen, buffer_type):
    changes = {"trainer.buffer_type": buffer_type, "buffer.max_policy_lag": 1, "trainer.total_updates": 4}
    assert_a_cut_leaves_no_trace(tmp_path, "toy", seen.toy | changes)


@pytest.mark.sim
@pytest.mark.slow
def test_a_cut_and_resumed_run_on_lift_equals_the_uncut_one(tmp_path, seen):
    """Episodes are open at the cut, and what their cameras show is rendered anew."""
    changes = {"trainer.buffer_type": "vla", "buffer.max_policy_lag": 1, "env.horizon": 26}
    assert_a_cut_leaves_no_trace(tmp_path, seen.lift_preset, SMALL_LIFT | seen.lift | changes)


def assert_a_cut_leaves_no_trace(folder, preset, changes):
    start(folder / "uncut", preset, changes)
    start(folder / "cut", preset, changes, stop_at=2)
    go_on(folder / "cut")
    assert_equal(outcome(folder / "uncut"), outcome(folder / "cut"))
