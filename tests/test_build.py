"""What building a run refuses: a ring that does not fit, a checkpoint without its own weights."""

from dataclasses import replace

import pytest
from silent import TOY, Silent, start

from asyncflow import build, resources
from asyncflow.build import build_parts
from asyncflow.checkpoint import list_checkpoints, load_checkpoint
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.launch import train
from asyncflow.presets import load_config


def test_a_ring_that_does_not_fit_is_refused_before_it_is_allocated(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "free_memory", lambda device: 1000)
    monkeypatch.setattr(build, "RolloutBuffer", lambda *_: pytest.fail("the ring was allocated"))
    with pytest.raises(ConfigError, match=r"device cpu: .* are free; lower buffer.buffer_size"):
        train(load_config("toy", TOY | {"logging.out": str(tmp_path / "run")}), Silent())
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_without_the_weights_of_its_own_update_is_refused(tmp_path):
    start(tmp_path / "run", "toy", TOY | {"buffer.max_policy_lag": 1})
    whole = load_checkpoint(list_checkpoints(tmp_path / "run")[-1])
    groups = {name: tensors for name, tensors in whole.groups.items() if name != "weights_6"}
    config = load_config("toy", TOY | {"buffer.max_policy_lag": 1, "trainer.total_updates": 8})
    with pytest.raises(CheckpointError, match=r"update_000006: lacks the weights of its own update 6$"):
        build_parts(config, resumed=replace(whole, groups=groups))
