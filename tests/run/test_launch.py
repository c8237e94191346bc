"""A run that was cut and resumed equals the uncut one, bit for bit; and what a resumed run refuses."""

import json
import os
import shutil

import pytest
from silent import LIFT_VLA, TOY, Silent, assert_equal, go_on, outcome, start

from asyncflow.config.presets import load_config
from asyncflow.errors import CheckpointError, ConfigError, EnvError
from asyncflow.run.checkpoint import list_checkpoints, load_checkpoint
from asyncflow.run.folder import lock_run_folder
from asyncflow.run.launch import train

slow = pytest.mark.slow
FLOW = {
    "policy.kind": "flow",
    "policy.log_prob": "joint_mean",
    "policy.noise_level_final": 0.3,
    "policy.anneal_updates": 5,
    "policy.noise_method": "flow_sde",
    "policy.hidden_sizes": [32],
    "algorithm.lr_schedule": "linear",
    "algorithm.critic_warmup_updates": 2,
}


@pytest.mark.parametrize("buffer_type", ["standard", "vla"])
@pytest.mark.parametrize(
    ("lag", "cut"), [(0, 4), pytest.param(1, 1, marks=slow), (2, 1), pytest.param(2, 4, marks=slow)]
)
def test_a_cut_and_resumed_run_equals_the_uncut_one(tmp_path, uncut, buffer_type, lag, cut):
    """Episodes are truncated within a rollout, and open at its end."""
    changes = TOY | FLOW | {"trainer.buffer_type": buffer_type, "buffer.max_policy_lag": lag, "env.horizon": 14}
    changes |= {"trainer.eval_interval": 2, "trainer.eval_episodes": 6}
    start(tmp_path / "cut", "toy", changes, stop_at=cut)
    assert len(list_checkpoints(tmp_path / "cut")) >= 1
    go_on(tmp_path / "cut")
    assert_equal(outcome(uncut(changes)), outcome(tmp_path / "cut"))


FAR = {"buffer.max_policy_lag": 3, "collector.num_env_groups": 2, "algorithm.target_kl": 1e-3}
N_STEP = {"buffer.max_policy_lag": 4, "algorithm.advantage": "n_step", "algorithm.n_step": 3}


@pytest.mark.parametrize("options", [FAR, N_STEP], ids=["lag 3, groups, target_kl", "lag 4, n_step"])
@pytest.mark.parametrize("cut", [2, 5])
def test_a_cut_far_behind_the_newest_weights_changes_nothing(tmp_path, uncut, options, cut):
    changes = TOY | FLOW | options | {"trainer.buffer_type": "vla", "trainer.total_updates": 8}
    start(tmp_path / "cut", "toy", changes, stop_at=cut)
    go_on(tmp_path / "cut")
    assert_equal(outcome(uncut(changes)), outcome(tmp_path / "cut"))


def test_a_run_cut_twice_equals_the_uncut_one(tmp_path, uncut):
    changes = TOY | {"trainer.buffer_type": "vla", "trainer.total_updates": 6}
    start(tmp_path / "cut", "toy", changes, stop_at=2)
    go_on(tmp_path / "cut", **{"trainer.total_updates": 4})
    go_on(tmp_path / "cut", **{"trainer.total_updates": 6})
    assert_equal(outcome(uncut(changes)), outcome(tmp_path / "cut"))


def test_a_step_size_that_a_larger_limit_raises_is_told_and_logged(tmp_path):
    changes = TOY | {"algorithm.lr_schedule": "linear", "algorithm.learning_rate": 0.001, "trainer.total_updates": 4}
    rows = start(tmp_path / "run", "toy", changes, stop_at=2).rows
    assert [row["train/learning_rate"] for row in rows] == pytest.approx([0.001, 0.00075])
    assert [row["train/critic_learning_rate"] for row in rows] == pytest.approx([0.001, 0.00075])
    as_planned = go_on(tmp_path / "run")
    assert [row["train/learning_rate"] for row in as_planned.rows] == pytest.approx([0.0005, 0.00025])
    assert not any("step size" in notice for notice in as_planned.notices)
    longer = go_on(tmp_path / "run", **{"trainer.total_updates": 8})
    assert longer.rows[0]["train/learning_rate"] == pytest.approx(0.0005)
    [told] = [notice for notice in longer.notices if "step size" in notice]
    assert "trainer.total_updates = 8" in told
    assert "from 0.00025 in update 4 to 0.0005 in the next" in told


@pytest.mark.sim
def test_a_cut_and_resumed_run_equals_the_uncut_one_on_lift(tmp_path, lift_vla):
    """As a killed process leaves it; episodes are open at the cut: their horizon is no multiple of a rollout.

    One worker instead of two changes nothing, either.
    """
    whole, _ = lift_vla
    shutil.copytree(whole, tmp_path / "cut", symlinks=True)
    middle, last = list_checkpoints(tmp_path / "cut")
    shutil.rmtree(last)
    assert load_checkpoint(middle).groups["journal"]["num_chunks"].min() > 0
    go_on(tmp_path / "cut", **{"env.num_workers": 1})
    assert_equal(outcome(whole), outcome(tmp_path / "cut"))


@pytest.mark.sim
@pytest.mark.slow
def test_a_cut_and_resumed_run_equals_the_uncut_one_on_lift_without_a_thread(tmp_path):
    changes = LIFT_VLA | {"trainer.buffer_type": "standard"}
    start(tmp_path / "uncut", "lift", changes)
    start(tmp_path / "cut", "lift", changes, stop_at=2)
    go_on(tmp_path / "cut")
    assert_equal(outcome(tmp_path / "uncut"), outcome(tmp_path / "cut"))


@pytest.mark.parametrize("on_full", ["block", "overwrite"])
def test_with_bounded_lag_nothing_is_trained_twice_and_the_books_balance(tmp_path, on_full):
    changes = TOY | {"buffer.lag_mode": "bounded", "buffer.max_policy_lag": 2, "buffer.on_full": on_full}
    changes |= {"trainer.buffer_type": "vla", "trainer.total_updates": 10}
    start(tmp_path / "run", "toy", changes, stop_at=5)
    reporter = go_on(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["updates"] for row in rows] == list(range(1, 11))
    assert [row["decisions"] for row in rows] == [32 * n for n in range(1, 11)]
    assert all(row["staleness/policy_lag_max"] <= 2 for row in rows)
    for row in reporter.rows:
        books = {name: row[f"buffer/{name}"] for name in ("collected", "trained", "in_flight", "dropped", "invalid")}
        assert books["trained"] == row["decisions"]
        assert books["collected"] == sum(books.values()) - books["collected"]


def stop_in_evaluation(updates):
    """Return a hook that requests a stop in the evaluation after an update."""

    def hook(run):
        check = run._check_evaluation

        def stop_there(num_finished):
            if run.progress.updates == updates:
                run.request_stop()
            check(num_finished)

        run._check_evaluation = stop_there

    return hook


@pytest.mark.parametrize("updates", [3, 6])
def test_an_evaluation_that_a_stop_cut_is_made_up_for(tmp_path, uncut, updates):
    changes = TOY | {"trainer.eval_interval": 3, "trainer.eval_episodes": 6}
    reporter = start(tmp_path / "cut", "toy", changes, on_built=stop_in_evaluation(updates))
    assert "eval/success_rate" not in reporter.rows[-1]
    go_on(tmp_path / "cut")
    assert_equal(outcome(uncut(changes)), outcome(tmp_path / "cut"))


def test_a_run_is_finished_once_its_last_evaluation_is_made_up_for(tmp_path):
    changes = TOY | {"trainer.eval_interval": 6, "trainer.eval_episodes": 6}
    start(tmp_path / "run", "toy", changes, on_built=stop_in_evaluation(6))
    go_on(tmp_path / "run")
    with pytest.raises(ConfigError, match="finished after 6 updates"):
        go_on(tmp_path / "run")


def test_what_fails_between_an_update_and_its_publication_leaves_a_run_that_goes_on(tmp_path, uncut):
    def fail_at_three(run):
        anneal = run.trainer.policy.anneal

        def fail(updates):
            if updates == 3:
                raise ArithmeticError("no noise level")
            anneal(updates)

        run.trainer.policy.anneal = fail

    changes = TOY | FLOW | {"trainer.save_interval": 1}
    with pytest.raises(ArithmeticError, match="no noise level"):
        start(tmp_path / "cut", "toy", changes, on_built=fail_at_three)
    go_on(tmp_path / "cut")
    assert_equal(outcome(uncut(changes)), outcome(tmp_path / "cut"))


WHERE_IT_FAILS = {  # between the publication of an update and the end of its row
    "release": lambda run: (run.trainer.channel.buffer, "release"),
    "books": lambda run: (run.trainer.channel.buffer, "books"),
    "logger": lambda run: (run._logger, "write"),
    "reporter": lambda run: (run.reporter, "update"),
}


def fail_after_update_3(run, owner, name):
    """Let a method raise once three updates are published."""
    method = getattr(owner, name)

    def fail(*arguments):
        if run.trainer.channel.publisher.newest == 3:
            raise ArithmeticError("lost the thread")
        return method(*arguments)

    setattr(owner, name, fail)


@pytest.mark.parametrize(
    ("where", "buffer_type"),
    [
        ("release", "vla"), ("books", "standard"), ("logger", "vla"), ("reporter", "standard"),
        pytest.param("release", "standard", marks=slow), pytest.param("books", "vla", marks=slow),
        pytest.param("logger", "standard", marks=slow), pytest.param("reporter", "vla", marks=slow),
    ],
)  # fmt: skip
def test_what_fails_between_a_publication_and_its_row_leaves_no_update_without_a_row(
    tmp_path, uncut, buffer_type, where
):
    changes = TOY | FLOW | {"trainer.buffer_type": buffer_type, "trainer.save_interval": 2}
    with pytest.raises(ArithmeticError, match="lost the thread"):
        start(
            tmp_path / "cut",
            "toy",
            changes,
            on_built=lambda run: fail_after_update_3(run, *WHERE_IT_FAILS[where](run)),
        )
    go_on(tmp_path / "cut")
    assert_equal(outcome(uncut(changes)), outcome(tmp_path / "cut"))
    state = load_checkpoint(list_checkpoints(tmp_path / "cut")[-1]).state
    assert state.books.trained == state.decisions == 6 * 32


def test_an_update_whose_row_was_written_is_saved_when_its_reporter_fails(tmp_path):
    with pytest.raises(ArithmeticError, match="lost the thread"):
        start(
            tmp_path / "run",
            "toy",
            TOY,
            on_built=lambda run: fail_after_update_3(run, run.reporter, "update"),
        )
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["update_000003"]


def test_an_evaluation_that_fails_is_made_up_for_with_its_row(tmp_path, uncut):
    def fail_in_evaluation(run):
        check = run._check_evaluation

        def fail(num_finished):
            if run.progress.updates == 3:
                raise EnvError("workers were replaced too often")
            check(num_finished)

        run._check_evaluation = fail

    changes = TOY | {"trainer.eval_interval": 3, "trainer.eval_episodes": 6}
    with pytest.raises(EnvError, match="too often"):
        start(tmp_path / "cut", "toy", changes, on_built=fail_in_evaluation)
    assert load_checkpoint(list_checkpoints(tmp_path / "cut")[-1]).state.updates == 3
    go_on(tmp_path / "cut")
    assert_equal(outcome(uncut(changes)), outcome(tmp_path / "cut"))


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    start(tmp_path / "run", "toy", TOY, stop_at=2)
    half = tmp_path / "run" / "checkpoints" / ".update_000003.1.tmp"
    half.mkdir()
    go_on(tmp_path / "run")
    assert not half.exists()


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
@pytest.mark.parametrize(
    "name",
    ["policy.safetensors", "checksums.json"]
    + [pytest.param(name, marks=slow) for name in ("training.safetensors", "state.json")],
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, uncut, damage, name):
    whole, folder = uncut(TOY | {"trainer.save_interval": 2}), tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    path = list_checkpoints(folder)[-1] / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    {
        "truncate": lambda: path.write_bytes(content[: len(content) // 2]),
        "flip": lambda: path.write_bytes(content),
        "remove": path.unlink,
    }[damage]()
    reporter = go_on(folder)
    assert any("update_000006" in notice and ("damaged" in notice) for notice in reporter.notices)
    assert f"going on from {folder / 'checkpoints' / 'update_000004'}" in reporter.notices
    assert_equal(outcome(whole), outcome(folder))


def test_without_a_whole_checkpoint_there_is_nothing_to_go_on_from(tmp_path):
    start(tmp_path / "run", "toy", TOY)
    for path in list_checkpoints(tmp_path / "run"):
        (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"nothing to go on from: .*state.json: damaged"):
        go_on(tmp_path / "run")


def test_a_run_that_was_cut_before_its_first_checkpoint_begins_again(tmp_path, uncut):
    start(tmp_path / "cut", "toy", TOY, stop_at=3)
    shutil.rmtree(tmp_path / "cut/checkpoints/update_000003")
    reporter = go_on(tmp_path / "cut")
    assert any("no checkpoint yet: beginning at update 0" in notice for notice in reporter.notices)
    assert_equal(outcome(uncut(TOY)), outcome(tmp_path / "cut"))


def test_a_finished_run_is_not_resumed(tmp_path):
    start(tmp_path / "run", "toy", TOY)
    with pytest.raises(ConfigError, match=r"finished after 6 updates .*raise trainer.total_updates"):
        go_on(tmp_path / "run")


def test_a_folder_in_which_a_run_goes_on_is_refused(tmp_path):
    start(tmp_path / "run", "toy", TOY, stop_at=2)
    descriptor = lock_run_folder(tmp_path / "run")
    with pytest.raises(ConfigError, match="another process is training in this run folder"):
        go_on(tmp_path / "run")
    os.close(descriptor)


def test_a_moved_run_goes_on_where_it_lies(tmp_path):
    start(tmp_path / "run", "toy", TOY, stop_at=2)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    go_on(tmp_path / "moved")
    assert len((tmp_path / "moved" / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_run_folder_is_never_written_over(tmp_path):
    changes = TOY | {"logging.out": str(tmp_path / "run"), "trainer.total_updates": 1}
    train(load_config("toy", changes), Silent())
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run"):
        train(load_config("toy", changes), Silent())
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_run_folder_holds_what_reproduces_it(tmp_path):
    train(load_config("toy", TOY | {"logging.out": str(tmp_path / "run"), "logging.logger": "tensorboard"}), Silent())
    names = {path.name.split(".")[0] for path in (tmp_path / "run").iterdir()}
    assert {"config", "versions", "metrics", "checkpoints", "events"} <= names
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6
