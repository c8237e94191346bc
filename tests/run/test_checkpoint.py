"""Checkpoints: whole or not at all, links that always point at one, and what is kept."""

import errno
import json
import math
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save as safetensors_save

from asyncflow.checksums import describe_folder
from asyncflow.config.sections import PolicyConfig
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.errors import CheckpointError
from asyncflow.policies import make_policy, policy_file
from asyncflow.policies.policy_file import load_policy_file, resolve_checkpoint
from asyncflow.rollout.episodes import Episode
from asyncflow.run import checkpoint, state
from asyncflow.run.checkpoint import (
    PolicyToSave,
    clean_checkpoints,
    find_newest,
    list_checkpoints,
    load_checkpoint,
    point_at,
    prune_checkpoints,
    save_checkpoint,
)
from asyncflow.run.progress import Progress
from asyncflow.run.state import RunState
from asyncflow.simulators.spec import EnvSpec

CONFIG = PolicyConfig(kind="gaussian", hidden_sizes=[8], critic_hidden_sizes=[8], log_prob="joint_sum")
SPEC = EnvSpec({"state": (3,)}, action_dim=2, horizon=10)
POLICY = make_policy(CONFIG, SPEC, seed=0)
JOURNAL = EpisodeJournal([4, 5], [[torch.zeros(4, 2)], []], [False, True])


def state_of(updates, **changes):
    """Return what a run stores of how far it is."""
    books = {"collected": 9, "trained": 8, "dropped": 0, "invalid": 1, "in_flight": 0}
    row = {"env_steps": 7, "updates": updates, "train/policy_loss": math.nan}
    state = Progress(env_steps=7, decisions=8, updates=updates, next_rollout=updates).to_state(books, 0, False, row)
    return replace(state, **changes)


def groups_of(updates, **changes):
    """Return the tensors that training goes on from."""
    weights = {f"weights_{version}": {"actor.0.weight": torch.arange(3.0)} for version in (updates - 1, updates)}
    moments = {"actor.0.weight.step": torch.ones(())}
    return {**weights, "optimizer": moments, "journal": JOURNAL.to_tensors(), **changes}


def save(run, updates, **changes):
    source = PolicyToSave(POLICY, CONFIG, SPEC)
    return save_checkpoint(run, source, state_of(updates, **changes), groups_of(updates))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_checkpoint_is_named_by_its_update_and_comes_back_as_it_was_saved(folder):
    path = save(folder, 12)
    assert path.name == "update_000012"
    loaded = load_checkpoint(path)
    assert json.loads((path / "state.json").read_text())["format"] == 1
    assert (loaded.state.updates, loaded.state.env_steps) == (12, 7)
    assert torch.equal(loaded.groups["weights_12"]["actor.0.weight"], torch.arange(3.0))
    assert loaded.groups["journal"]["episodes"].tolist() == [4, 5]
    assert loaded.policy.keys() == POLICY.state_dict().keys()
    assert load_policy_file(path / "policy.safetensors").env_spec == SPEC


def test_last_is_the_newest_and_a_run_folder_means_it(folder):
    save(folder, 1)
    save(folder, 2)
    assert resolve_checkpoint(str(folder)).resolve() == folder / "checkpoints/update_000002/policy.safetensors"


def test_a_link_can_be_moved(folder):
    first, second = save(folder, 1), save(folder, 2)
    point_at(folder, "best", first)
    point_at(folder, "best", second)
    assert (folder / "checkpoints/best").resolve() == second


def test_saving_an_update_twice_keeps_the_first(folder):
    assert save(folder, 3) == save(folder, 3)
    assert names(folder) == ["last", "update_000003"]


def test_another_state_of_the_same_update_replaces_the_first(folder):
    """As that of a run which was stopped before an evaluation and made up for it when it was resumed."""
    save(folder, 3)
    path = save(folder, 3, env_steps=8)
    assert load_checkpoint(path).state.env_steps == 8
    assert names(folder) == ["last", "update_000003"]


def test_a_process_killed_while_it_replaces_a_checkpoint_leaves_the_old_one(folder):
    path = save(folder, 3)
    path.rename(path.with_name(".update_000003.replaced"))
    clean_checkpoints(folder)
    assert load_checkpoint(path).state.updates == 3
    path.with_name(".update_000003.replaced").mkdir()
    clean_checkpoints(folder)
    assert names(folder) == ["last", "update_000003"]


def test_a_checkpoint_of_another_format_is_refused_in_one_line(folder, monkeypatch):
    monkeypatch.setattr(state, "FORMAT", 7)
    path = save(folder, 3)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"update_000003/state.json: format 7, this asyncflow reads 1"):
        load_checkpoint(path)


def test_checkpoints_of_one_update_can_be_damaged_again_and_again(folder):
    save(folder, 1)
    for _ in range(3):
        (save(folder, 2) / "state.json").write_bytes(b"")
        assert find_newest(folder)[0].path.name == "update_000001"
    assert names(folder) == [*(f"damaged_update_000002_{n}" for n in range(3)), "last", "update_000001"]


@pytest.mark.parametrize("num_written", [0, 1, 2, 3])
def test_a_full_disk_harms_neither_the_last_checkpoint_nor_the_folder(folder, monkeypatch, num_written):
    """Whichever of the files the disk is full at."""
    save(folder, 1)
    write, calls = checkpoint.write_atomically, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) > num_written:
            raise OSError(28, "No space left on device")
        write(*arguments)

    for module in (checkpoint, policy_file):
        monkeypatch.setattr(module, "write_atomically", fail)
    with pytest.raises(OSError, match="No space left"):
        save(folder, 2)
    assert names(folder) == ["last", "update_000001"]
    assert find_newest(folder)[0].state.updates == 1


def test_the_newest_are_kept_and_the_best(folder):
    paths = [save(folder, updates) for updates in range(1, 6)]
    point_at(folder, "best", paths[1])
    prune_checkpoints(folder, 2)
    assert names(folder) == ["best", "last", "update_000002", "update_000004", "update_000005"]
    prune_checkpoints(folder, None)
    assert len(list_checkpoints(folder)) == 3


def test_without_symbolic_links_files_name_the_newest_and_the_best(folder, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    paths = [save(folder, updates) for updates in range(1, 5)]
    point_at(folder, "best", paths[0])
    prune_checkpoints(folder, 2)
    clean_checkpoints(folder)
    assert names(folder) == ["best", "last", "update_000001", "update_000003", "update_000004"]
    for name in (folder, folder / "checkpoints/last"):
        assert resolve_checkpoint(str(name)) == paths[3] / "policy.safetensors"
    assert find_newest(folder)[0].path == paths[3]


def test_checkpoints_are_in_the_order_of_their_numbers(folder):
    for updates in (1_000_000, 999_999, 5):
        save(folder, updates)
    assert [path.name for path in list_checkpoints(folder)] == ["update_000005", "update_999999", "update_1000000"]


def test_a_damaged_checkpoint_is_set_aside_and_can_be_written_again(folder):
    save(folder, 1)
    damaged = save(folder, 2)
    (damaged / "training.safetensors").write_bytes(b"")
    found, problems = find_newest(folder)
    assert found.path.name == "update_000001"
    assert problems == [f"{damaged / 'training.safetensors'}: damaged: its checksum differs"]
    assert (folder / "checkpoints/last").resolve().name == "update_000001"
    save(folder, 2)
    assert find_newest(folder)[0].path.name == "update_000002"


def test_what_a_policy_exports_is_checked_like_the_rest(folder, monkeypatch):
    def export(path):
        (path / "elsewhere").mkdir()
        (path / "elsewhere" / "model.bin").write_bytes(b"whole")

    monkeypatch.setattr(POLICY, "export", export)
    path = save(folder, 1)
    assert load_checkpoint(path).state.updates == 1
    (path / "elsewhere" / "model.bin").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"elsewhere/model.bin: damaged: its checksum differs"):
        load_checkpoint(path)


def test_what_a_killed_process_left_is_no_checkpoint_and_is_removed(folder):
    save(folder, 1)
    (folder / "checkpoints/.update_000002.77.tmp").mkdir()
    (folder / "checkpoints/.last.77.tmp").symlink_to("update_000002")
    (folder / "checkpoints/best").symlink_to("update_000002")
    assert [path.name for path in list_checkpoints(folder)] == ["update_000001"]
    clean_checkpoints(folder)
    assert names(folder) == ["last", "update_000001"]


def test_what_others_keep_beside_checkpoints_stays(folder):
    """`checkpoints` may be a link, which a stranger's run can point at any folder."""
    save(folder, 1)
    for name in (".mine.tmp", ".update_1.tmp", ".notes.replaced"):
        (folder / "checkpoints" / name).mkdir()
    clean_checkpoints(folder)
    assert names(folder) == [".mine.tmp", ".notes.replaced", ".update_1.tmp", "last", "update_000001"]


def test_a_state_that_is_not_the_one_written_is_damage(folder):
    path = save(folder, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"env_steps": 8}))
    with pytest.raises(CheckpointError, match=r"state.json: damaged: its checksum differs"):
        load_checkpoint(path)


def rewrite(path, **contents):
    """Replace files of a checkpoint by others, with checksums that agree."""
    for name, content in contents.items():
        (path / {"state": "state.json", "training": "training.safetensors"}[name]).write_bytes(content)
    (path / "checksums.json").unlink()
    (path / "checksums.json").write_bytes(describe_folder(path))


STATE_LIES = {
    "a list": "[]",
    "null": "null",
    "deep nesting": "[" * 100_000,
    "a key less": {"books": None},
    "a negative clock": {"env_steps": -1},
    "a clock of text": {"decisions": "many"},
    "a clock beyond 64 bits": {"next_rollout": 2**64},
    "a fraction of an update": {"updates": 2.5},
    "a best success that is NaN": {"best_success": math.nan},
    "books that do not balance": {
        "books": dict.fromkeys(("collected", "trained", "dropped", "invalid", "in_flight"), 1)
    },
    "books of text": {"books": "balanced"},
    "faults of text": {"faults": {"died": "often"}},
    "null rows": {"row": None},
    "a row of text": {"row": {"env_steps": 7, "updates": 2, "train/entropy": "low"}},
    "a row of unknown metrics": {"row": {"env_steps": 7, "updates": 2, "train/unheard_of": 1}},
    "a row without a clock": {"row": {"updates": 2}},
    "an owed evaluation of text": {"is_evaluation_owed": "yes"},
    "half an episode": {"episodes": [[1, 2.0]]},
}


@pytest.mark.parametrize("lie", STATE_LIES)
def test_a_state_that_cannot_be_is_damage_and_the_checkpoint_before_is_taken(folder, lie):
    save(folder, 1)
    path, change = save(folder, 2), STATE_LIES[lie]
    content = change if isinstance(change, str) else json.dumps(json.loads(state_of(2).to_json()) | change)
    rewrite(path, state=content.encode())
    found, problems = find_newest(folder)
    assert found.path.name == "update_000001"
    assert str(path) in problems[0]
    assert "\n" not in problems[0]


def journal_with(**changes):
    return {"journal": JOURNAL.to_tensors() | changes}


GROUP_LIES = {
    "no newest weights": {"weights_2": {}},
    "weights of the future": {"weights_3": {"actor.0.weight": torch.arange(3.0)}},
    "weights of no version": {"weights_x": {"actor.0.weight": torch.arange(3.0)}},
    "weights of NaN": {"weights_2": {"actor.0.weight": torch.full((3,), math.nan)}},
    "moments of NaN": {"optimizer": {"actor.0.weight.exp_avg": torch.full((3,), math.nan)}},
    "half a journal": {"journal": {"episodes": torch.tensor([4, 5])}},
    "more chunks than there are": journal_with(num_chunks=torch.tensor([9, 9])),
    "fewer than no chunks": journal_with(num_chunks=torch.tensor([2, -1])),
    "a journal of fractions": journal_with(episodes=torch.tensor([0.5, 1.5])),
    "chunks of another rank": journal_with(chunks=torch.zeros(1)),
    "chunks of NaN": journal_with(chunks=torch.full((1, 4, 2), math.nan)),
    "another number of environments": journal_with(is_lost=torch.tensor([True])),
}


@pytest.mark.parametrize("lie", GROUP_LIES)
def test_tensors_that_training_cannot_go_on_from_are_damage(folder, lie):
    save(folder, 1)
    path = save(folder, 2)
    groups = groups_of(2, **GROUP_LIES[lie])
    rewrite(path, training=safetensors_save({f"{g}/{n}": t for g, group in groups.items() for n, t in group.items()}))
    found, problems = find_newest(folder)
    assert found.path.name == "update_000001"
    assert f"{path}/training.safetensors: " in problems[0]


@pytest.mark.parametrize("name", ["state.json", "training.safetensors", "policy.safetensors", "checksums.json"])
def test_a_folder_in_place_of_a_file_is_damage(folder, name):
    save(folder, 1)
    path = save(folder, 2) / name
    path.unlink()
    path.mkdir()
    assert find_newest(folder)[0].path.name == "update_000001"


def test_a_state_of_keys_more_and_less_is_read(folder):
    """An older asyncflow did not store `episodes`; a newer one may store what this one does not know."""
    row = {"env_steps": 7, "updates": 2}
    path = save(folder, 2, row=row)
    state = json.loads((path / "state.json").read_text())
    del state["episodes"]
    rewrite(path, state=json.dumps(state | {"unheard_of": 1}).encode())
    assert load_checkpoint(path).state == state_of(2, row=row)


def test_a_stored_state_comes_back_as_it_was():
    state = state_of(2, row={"env_steps": 7, "updates": 2}, episodes=[Episode(3, 0.5, 9, True)], faults={"died": 1})
    assert RunState.from_json(state.to_json().encode()) == state
