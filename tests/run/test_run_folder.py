"""A run's folder: one run, one writer, and what may change when it is resumed."""

import errno
import json
import os
import time

import pytest

from asyncflow import terminal
from asyncflow.config.presets import load_config
from asyncflow.config.sections import describe_keys, values_by_key
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.run.folder import (
    CHANGEABLE,
    changed_versions,
    create_run_folder,
    describe_versions,
    lock_run_folder,
    name_run_folder,
    note_simulators,
    resume_config,
)


@pytest.fixture
def folder(tmp_path):
    config = load_config("toy", {"logging.out": str(tmp_path / "run")})
    os.close(create_run_folder(name_run_folder(config), config)[1])
    return tmp_path / "run"


def test_another_version_of_what_simulates_is_told(tmp_path):
    (tmp_path / "versions.json").write_text('{"python": "3.11.7"}')
    assert note_simulators(tmp_path, {"python": "3.8.1", "robosuite": "1.4.1"}) == []
    assert note_simulators(tmp_path, {"python": "3.8.1", "robosuite": "1.4.1"}) == []
    assert note_simulators(tmp_path, {"python": "3.8.1", "robosuite": "1.5.2"}) == [
        "simulators.robosuite was 1.4.1, is 1.5.2"
    ]


def test_a_folder_that_holds_a_run_is_refused(folder):
    config = load_config("toy", {"logging.out": str(folder)})
    with pytest.raises(ConfigError, match=r"logging.out = .*already holds a run.*--resume"):
        name_run_folder(config)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    config = load_config("toy", {"logging.out": str(tmp_path / "file" / "run")})
    with pytest.raises(ConfigError, match=r"logging.out = .*: Not a directory"):
        create_run_folder(name_run_folder(config), config)


def test_versions_name_what_a_result_depends_on():
    versions = describe_versions()
    assert {"python", "git_commit", "torch", "mujoco", "robosuite", "processor"} <= set(versions)


def test_another_processor_or_other_kernels_are_named(folder, monkeypatch):
    before = describe_versions()["processor"]
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Nehalem")
    assert [each for each in changed_versions(folder) if "processor" in each] == [
        f"processor was {before}, is {describe_versions()['processor']}"
    ]
    assert describe_versions()["processor"].endswith("OPENBLAS_CORETYPE=Nehalem")


def test_a_run_from_before_processors_were_noted_has_nothing_to_tell_of_them(folder):
    versions = describe_versions()
    del versions["processor"]
    (folder / "versions.json").write_text(json.dumps(versions))
    assert changed_versions(folder) == []


def test_a_resumed_run_keeps_its_configuration_but_for_what_may_change(folder):
    config = resume_config(folder, {"trainer.total_updates": 77})
    assert config.trainer.total_updates == 77
    assert config.policy == load_config("toy").policy


@pytest.mark.parametrize(
    ("key", "own"), [("trainer.seed", 0), ("env.num_envs", 16), ("buffer.max_policy_lag", None), ("env.task", "'Toy'")]
)
def test_what_would_make_it_another_run_is_refused_with_both_values(folder, key, own):
    said = rf"{key} = 3: cannot change with --resume, the run has {own}; may change: trainer.total_updates"
    with pytest.raises(ConfigError, match=said):
        resume_config(folder, {key: 3})


def test_a_moved_output_folder_is_refused(folder):
    with pytest.raises(ConfigError, match=r"logging.out = 'x': cannot change with --resume, the run has '.*run'"):
        resume_config(folder, {"logging.out": "x"})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"collector": {"num_env_groups": 2}}, "collector.num_env_groups = 2"),
        ({"policy.vla": {"size": "base"}}, "policy.vla.size = 'base'"),
        ({"policy.vla.model_config.width": 8}, r"policy.vla.model_config = \{'width': 8\}"),
    ],
)
def test_a_change_within_a_section_or_a_value_is_refused_too(folder, overrides, said):
    with pytest.raises(ConfigError, match=f"{said}: cannot change with --resume"):
        resume_config(folder, overrides)


def test_values_that_the_run_has_anyway_may_be_given_again(folder):
    run = resume_config(folder, {})
    assert resume_config(folder, values_by_key(run)) == run


def test_an_unknown_key_is_named_with_the_nearest(folder):
    with pytest.raises(ConfigError, match=r"unknown key trainer.sed; did you mean trainer.seed\?"):
        resume_config(folder, {"trainer.sed": 3})


def test_whatever_may_change_is_a_key():
    assert set(CHANGEABLE) <= {name for name, *_ in describe_keys()}


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(CheckpointError, match=r"--resume .*: holds no run"):
        resume_config(tmp_path, {})


def test_a_damaged_configuration_is_one_line(folder):
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(CheckpointError, match=r"config.yaml is damaged"):
        resume_config(folder, {})


def test_a_run_folder_has_one_writer(folder):
    descriptor = lock_run_folder(folder)
    with pytest.raises(ConfigError, match="another process is training"):
        lock_run_folder(folder)
    os.close(descriptor)
    os.close(lock_run_folder(folder))


def test_a_run_that_began_meanwhile_is_not_written_over(folder):
    """Between naming the folder and creating it lie the seconds in which simulators are built."""
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="already holds a run"):
        create_run_folder(folder, load_config("toy", {"trainer.seed": 9, "logging.out": str(folder)}))
    assert (folder / "config.yaml").read_text() == before
    os.close(lock_run_folder(folder))  # the refusal let go of the lock


def test_equal_runs_that_begin_in_the_same_second_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    folder = name_run_folder(load_config("toy"))
    made = [create_run_folder(folder, load_config("toy")) for _ in range(3)]
    for _, descriptor in made:
        os.close(descriptor)
    assert [path.name for path, _ in made] == [f"Toy_vla_seed0_now{end}" for end in ("", "_2", "_3")]


@pytest.mark.parametrize("name", ["metrics.jsonl", "versions.json", "trace.json", "checkpoints/update_000100"])
def test_a_folder_that_holds_what_a_run_would_write_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("another tool's\n")
    config = load_config("toy", {"logging.out": str(tmp_path / "run")})
    for refused in (name_run_folder, lambda config: create_run_folder(tmp_path / "run", config)):
        with pytest.raises(ConfigError, match=f"already holds {name}"):
            refused(config)
    assert (tmp_path / "run" / name).read_text() == "another tool's\n"


def test_a_folder_with_other_files_may_become_a_run(tmp_path):
    (tmp_path / "run.log").write_text("what the run prints")
    config = load_config("toy", {"logging.out": str(tmp_path)})
    folder, descriptor = create_run_folder(name_run_folder(config), config)
    os.close(descriptor)
    assert folder == tmp_path
    assert (tmp_path / "run.log").read_text() == "what the run prints"


def test_a_file_system_without_locks_refuses_no_run(folder, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr(terminal, "_told", set())
    for _ in range(2):
        os.close(lock_run_folder(folder))
    assert capsys.readouterr().err.count("no other process trains there") == 1


@pytest.mark.parametrize("content", ["", "- 1\n"])
def test_a_configuration_without_sections_is_damaged(folder, content):
    (folder / "config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=r"config.yaml is damaged: expected a mapping of sections, got "):
        resume_config(folder, {"trainer.total_updates": 3})


def test_other_versions_than_at_the_beginning_are_named(folder):
    assert changed_versions(folder) == []
    path = folder / "versions.json"
    path.write_text(path.read_text().replace(f'"torch": "{describe_versions()["torch"]}"', '"torch": "1.0"'))
    assert changed_versions(folder) == [f"torch was 1.0, is {describe_versions()['torch']}"]


@pytest.mark.parametrize("key", ["env.env_meta", "policy.checkpoint", "policy.vla.model_path"])
def test_paths_are_kept_so_that_a_run_goes_on_from_another_folder(tmp_path, monkeypatch, key):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    config = load_config("toy", {key: "file", "logging.out": "run"})
    assert values_by_key(config)[key] == str(tmp_path / "file")
    os.close(create_run_folder(name_run_folder(config), config)[1])
    assert values_by_key(resume_config(tmp_path / "run", {key: "file"}))[key] == str(tmp_path / "file")
    monkeypatch.chdir("/")
    with pytest.raises(ConfigError, match="cannot change with --resume"):
        resume_config(tmp_path / "run", {key: "another"})


@pytest.mark.parametrize("name", ["lift_flow", "organisation/model"])
def test_names_that_are_no_paths_stay(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lift_flow").mkdir()
    assert load_config("lift", {"policy.checkpoint": name}).policy.checkpoint == name


@pytest.mark.parametrize("content", ["[]", "null", "3", '{"torch": null}', '{"torch": ["2"]}', "[" * 100_000, ""])
def test_damaged_versions_are_told(tmp_path, content):
    (tmp_path / "versions.json").write_text(content)
    assert changed_versions(tmp_path) == ["versions.json is missing or damaged"]


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "trace_000001.json", "events.out.tfevents.1.host.2"])
def test_a_run_writes_through_no_link(folder, tmp_path, name):
    """A stranger's run could otherwise overwrite a file of the user's."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match=rf"{name}: is a symbolic link"):
        lock_run_folder(folder)
    assert not (tmp_path / "mine").exists()


def test_checkpoints_may_lie_on_another_disk(folder, tmp_path):
    (folder / "checkpoints").rename(tmp_path / "elsewhere")
    (folder / "checkpoints").symlink_to(tmp_path / "elsewhere")
    os.close(lock_run_folder(folder))
