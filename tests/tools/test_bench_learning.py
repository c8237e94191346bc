"""What the learning benchmark trains again, refuses, evaluates and writes; nothing is trained here."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from asyncflow.config.presets import load_config
from asyncflow.run.evaluate import EvalResult

RESULT = EvalResult(50, 40, 0.8, 0.669629, 0.887, 61.25, 12.0, 3.0)


@pytest.fixture(scope="module")
def bench(tools):
    return tools("bench.learning.run")


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(
        out=tmp_path / "runs",
        data=tmp_path / "data",
        conditions=["standard", "vla"],
        seeds=[0, 1],
        task_config="toy",
        override=["trainer.total_updates=12"],
        save_interval=4,
        final_episodes=200,
        curve_episodes=50,
        from_update=0,
        emulate=None,
    )


@pytest.fixture
def runs(bench, options):
    return [bench.Run(condition, seed, options.out) for seed in options.seeds for condition in options.conditions]


class Training:
    """Takes the place of `asyncflow train`: leaves a run's files, and fails or is killed if it is told to."""

    def __init__(self):
        self.commands, self.returncode, self.is_killed = [], 0, False

    def __call__(self, command, *, stdout, **_):
        self.commands.append(command)
        leave_run(find_folder(command), [4, 8, 12])
        stdout.write("it says why")
        if self.is_killed:
            raise KeyboardInterrupt
        return SimpleNamespace(returncode=self.returncode)

    @property
    def trained(self):
        return [find_folder(command).name for command in self.commands]


def find_folder(command):
    """Return the run folder that a command names."""
    return Path(command[command.index("--out") + 1])


def leave_run(folder, checkpoints, start=None):
    """Write what a run of the toy leaves: an update takes 100 env steps and 2 s."""
    for updates in checkpoints:
        saved = folder / "checkpoints" / f"update_{updates:06d}"
        saved.mkdir(parents=True)
        (saved / "policy.safetensors").touch()
    config = load_config("toy", {"policy.checkpoint": start} if start else {})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    rows = [{"updates": k, "env_steps": 100 * k, "wall_s": 2.0 * k} for k in range(1, max(checkpoints) + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def training(bench, monkeypatch):
    started = Training()
    monkeypatch.setattr(bench.subprocess, "run", started)
    monkeypatch.setattr(bench, "describe_software", lambda: {"commit": "c0ffee", "torch": "2.9"})
    monkeypatch.setattr(bench, "describe_machine", lambda: {"processor": "Abacus"})
    monkeypatch.setattr(bench, "describe_command", lambda: "python -m tools.bench.learning")
    return started


def read_meta(options):
    return json.loads((options.data / "learning_meta.json").read_text())


# Training.


def test_a_finished_run_is_not_trained_again(bench, runs, options, training):
    bench.train_all(runs[:2], options)
    bench.train_all(runs, options)
    assert training.trained == [
        "learning_standard_seed0",
        "learning_vla_seed0",
        "learning_standard_seed1",
        "learning_vla_seed1",
    ]


def test_a_run_has_the_mode_the_seed_and_what_is_the_same_for_all(bench, runs, options, training):
    bench.train_one(runs[3], options, "c0ffee")
    said = " ".join(training.commands[0])
    assert "--buffer-type vla" in said
    assert "--seed 1" in said
    assert "--config toy" in said
    assert "trainer.eval_interval=0" in said  # evaluations would be in nobody's seconds but in their caches
    assert "trainer.keep_last=null" in said
    assert "trainer.save_interval=4" in said
    assert "trainer.total_updates=12" in said


@pytest.mark.parametrize("change", [{"override": []}, {"save_interval": 2}, {"task_config": "lift"}])
def test_a_finished_run_with_other_arguments_is_refused(bench, runs, options, training, change):
    bench.train_all(runs[:1], options)
    other = argparse.Namespace(**vars(options) | change)
    for phase in (bench.train_all, bench.evaluate_all):
        with pytest.raises(SystemExit, match=r"was trained with other arguments .*; choose another --out"):
            phase(runs[:1], other)
    assert len(training.commands) == 1


def test_a_run_that_was_interrupted_starts_anew_and_what_it_left_is_kept(bench, runs, options, training):
    training.is_killed = True
    with pytest.raises(KeyboardInterrupt):
        bench.train_all(runs[:1], options)
    (runs[0].folder / "left").touch()
    training.is_killed = False
    bench.train_all(runs[:1], options)
    assert training.trained == ["learning_standard_seed0"] * 2
    assert not (runs[0].folder / "left").exists()
    assert (options.out / "learning_standard_seed0_set_aside_1" / "left").exists()


def test_a_run_that_fails_says_why_and_is_not_finished(bench, runs, options, training):
    training.returncode = 3
    with pytest.raises(SystemExit, match="learning_standard_seed0 ended with exit code 3:\nit says why"):
        bench.train_all(runs, options)
    assert not bench.is_trained(runs[0], options)
    assert len(training.commands) == 1


def test_seconds_of_another_machine_are_not_mixed_in(bench, runs, options, training, monkeypatch):
    bench.train_all(runs[:1], options)
    monkeypatch.setattr(bench, "describe_machine", lambda: {"processor": "another"})
    with pytest.raises(SystemExit, match=r"was measured on another machine: .*Abacus"):
        bench.train_all(runs, options)
    assert len(training.commands) == 1


def test_each_run_keeps_the_commit_that_it_was_trained_with(bench, runs, options, training, monkeypatch):
    bench.train_all(runs[:1], options)
    monkeypatch.setattr(bench, "describe_software", lambda: {"commit": "beef", "torch": "3.0"})
    bench.train_all(runs[:2], options)
    assert read_meta(options)["commits"] == {"learning_standard_seed0": "c0ffee", "learning_vla_seed0": "beef"}


def test_a_command_is_named_once_however_often_it_was_given(bench, runs, options, training, monkeypatch):
    bench.train_all(runs[:1], options)
    bench.train_all(runs[:1], options)
    monkeypatch.setattr(bench, "describe_command", lambda: "python -m tools.bench.learning --seeds 1")
    bench.train_all(runs[:1], options)
    commands = ["python -m tools.bench.learning", "python -m tools.bench.learning --seeds 1"]
    assert read_meta(options)["commands"] == commands


# Evaluation.


class FakeEvaluator:
    """Notes what is measured."""

    measured = None  # a list, for each test

    def __init__(self, config):
        self.config = config

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def measure(self, path, num_episodes):
        self.measured.append((path.parent.name, num_episodes))
        return replace(RESULT, num_episodes=num_episodes)


@pytest.fixture
def measured(bench, monkeypatch):
    """Return the list of what is measured."""
    monkeypatch.setattr(FakeEvaluator, "measured", [])
    monkeypatch.setattr(bench, "Evaluator", FakeEvaluator)
    return FakeEvaluator.measured


@pytest.fixture
def evaluated(bench, runs, options, training, measured):
    """Train and evaluate everything."""
    bench.train_all(runs, options)
    bench.evaluate_all(runs, options)


def test_checkpoints_are_found_in_order_after_the_start(bench, runs, tmp_path):
    start = tmp_path / "start.safetensors"
    start.touch()
    leave_run(runs[0].folder, [100, 8, 12], str(start))
    (runs[0].folder / "checkpoints" / "last").symlink_to("update_000100")
    found = bench.find_checkpoints(runs[0])
    assert list(found) == [0, 8, 12, 100]
    assert found[0] == start
    assert [path.parent.name for path in list(found.values())[1:]] == [
        "update_000008",
        "update_000012",
        "update_000100",
    ]


def test_the_last_checkpoint_has_more_episodes_and_each_its_own_clocks(bench, runs, options, tmp_path, measured):
    start = tmp_path / "start" / "start.safetensors"
    start.parent.mkdir()
    start.touch()
    leave_run(runs[0].folder, [4, 8], str(start))
    rows = list(bench.evaluate_run(runs[0], bench.Evaluator(None), options))
    assert measured == [("start", 50), ("update_000004", 50), ("update_000008", 200)]
    clocks = [(row["updates"], row["env_steps"], row["wall_s"], row["num_episodes"]) for row in rows]
    assert clocks == [(0, 0, 0.0, 50), (4, 400, 8.0, 50), (8, 800, 16.0, 200)]


def test_a_run_without_start_weights_has_no_point_before_its_first_checkpoint(bench, runs, options, measured):
    leave_run(runs[0].folder, [4, 8])
    rows = list(bench.evaluate_run(runs[0], bench.Evaluator(None), options))
    assert [row["updates"] for row in rows] == [4, 8]


def test_checkpoints_before_the_first_that_is_asked_for_are_left_out(bench, runs, options, measured):
    leave_run(runs[0].folder, [4, 8, 12])
    options.from_update = 8
    assert [row["updates"] for row in bench.evaluate_run(runs[0], bench.Evaluator(None), options)] == [8, 12]
    assert measured == [("update_000008", 50), ("update_000012", 200)]
    assert bench.name_table(options) == "evaluation_200_50_from_8.csv"


def test_an_evaluation_without_a_checkpoint_is_refused(bench, runs, options, measured):
    leave_run(runs[0].folder, [4, 8])
    options.from_update = 12
    with pytest.raises(SystemExit, match="no checkpoint from update 12 on"):
        list(bench.evaluate_run(runs[0], bench.Evaluator(None), options))


def test_a_checkpoint_is_not_taken_for_one_that_cost_nothing(bench, runs, options, measured):
    leave_run(runs[0].folder, [4, 8])
    metrics = runs[0].folder / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:7]))
    with pytest.raises(SystemExit, match=r"metrics.jsonl has no row of updates \[8\]"):
        list(bench.evaluate_run(runs[0], bench.Evaluator(None), options))


def test_tables_are_read_back_as_the_points_of_their_condition_and_seed(bench, tools, runs, options, evaluated):
    learning = tools("bench.learning.curves")
    curves, point = learning.read_curves(options.data), learning.Point
    expected = [point(4, 400, 8.0, 50, 40), point(8, 800, 16.0, 50, 40), point(12, 1200, 24.0, 200, 40)]
    assert curves == {mode: {0: expected, 1: expected} for mode in ("standard", "vla")}
    table = (options.data / "learning_vla_seed1.csv").read_text().splitlines()
    assert table[1] == "4,400,8,50,40,0.8,0.669629,0.887,61.25"


def test_what_was_evaluated_is_not_evaluated_again_but_with_other_numbers_of_episodes(
    bench, runs, options, training, measured
):
    bench.train_all(runs, options)
    for _ in range(2):
        bench.evaluate_all(runs, options)
        assert len(measured) == 4 * 3
    options.curve_episodes = 16
    bench.evaluate_all(runs[:1], options)
    assert [num for _, num in measured[12:]] == [16, 16, 200]
    assert (options.data / "learning_standard_seed0.csv").read_text().splitlines()[1].split(",")[3] == "16"


def test_a_run_that_is_not_trained_is_not_evaluated(bench, runs, options, training, measured):
    bench.train_all(runs[:3], options)
    with pytest.raises(SystemExit, match="learning_vla_seed1 is not trained"):
        bench.evaluate_all(runs, options)
    assert measured == []


def test_weights_that_all_runs_start_from_are_evaluated_once(bench, monkeypatch, tmp_path):
    calls = []
    policy = SimpleNamespace(to=lambda _: None)
    monkeypatch.setattr(bench, "load_policy_file", lambda path: SimpleNamespace(policy_config=path))
    monkeypatch.setattr(bench, "make_policy", lambda *_: policy)
    monkeypatch.setattr(bench, "load_into", lambda *_: None)
    monkeypatch.setattr(bench, "evaluate", lambda *arguments: calls.append(arguments[2:]) or RESULT)
    with bench.Evaluator(load_config("toy", {"trainer.seed": 5})) as evaluator:
        for num_episodes in (50, 50, 200):
            evaluator.measure(tmp_path / "start", num_episodes)
        evaluator.measure(tmp_path / "another", 50)
    assert calls == [(50, 5), (200, 5), (50, 5)]  # episodes, and the seed of the runs
