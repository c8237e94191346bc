"""Episode statistics are those of every episode that began, not of those that ended first."""

import random

import pytest
from silent import TOY, start

from asyncflow.metrics.glossary import is_known
from asyncflow.rollout.episodes import Episode, episode_metrics
from asyncflow.run.progress import Progress

NUM_ENVS, NUM_STEPS, HORIZON = 400, 60, 100  # decisions; a failure lasts until the horizon


def fair_end(index):
    """Return the first decision of which an episode may be open at a rollout's end."""
    return NUM_STEPS * (index + 1) - HORIZON + 1


def simulate(num_rollouts, success=0.59):
    """Return the episodes that end in each rollout of a policy that solves the task early, or not at all."""
    rng, rollouts = random.Random(0), [[] for _ in range(num_rollouts)]
    for _ in range(NUM_ENVS):
        now = 0
        while now < num_rollouts * NUM_STEPS:
            is_success = rng.random() < success
            length = rng.randint(12, 40) if is_success else HORIZON
            rollout = (now + length - 1) // NUM_STEPS
            if rollout < num_rollouts:
                rollouts[rollout].append(Episode(now, float(is_success), length, is_success))
            now += length
    return rollouts


def test_success_is_not_that_of_whoever_ends_first():
    progress, rollouts = Progress(), simulate(10)
    assert all(episode.is_success for episode in rollouts[0])  # nobody fails before the horizon
    rows = [episode_metrics(progress.take_episodes(ended, fair_end(n))) for n, ended in enumerate(rollouts)]
    assert rows[0] == {"rollout/num_episodes": 0.0}
    for row in rows[1:]:
        assert row["rollout/num_episodes"] > 300
        assert row["rollout/success_rate"] == pytest.approx(0.59, abs=0.08)
        assert row["rollout/episode_length"] == pytest.approx(0.59 * 26 + 0.41 * HORIZON, rel=0.12)


def test_every_episode_is_counted_once_when_all_that_began_with_it_are_over():
    progress, rollouts = Progress(), simulate(6)
    total = sum(len(progress.take_episodes(ended, fair_end(n))) for n, ended in enumerate(rollouts))
    assert total + len(progress.episodes) == sum(map(len, rollouts))
    assert all(episode.start >= fair_end(5) for episode in progress.episodes)


def test_where_nothing_is_a_success_there_is_no_rate():
    row = episode_metrics([Episode(0, 5.0, 10, False)], has_success=False)
    assert row == {"rollout/num_episodes": 1.0, "rollout/episode_return": 5.0, "rollout/episode_length": 10.0}


def test_success_is_what_the_environment_said_not_a_positive_return():
    assert episode_metrics([Episode(0, 5.0, 10, False), Episode(3, 1.0, 20, True)]) == {
        "rollout/num_episodes": 2.0,
        "rollout/success_rate": 0.5,
        "rollout/episode_return": 3.0,
        "rollout/episode_length": 15.0,
    }


@pytest.mark.parametrize("groups", [1, 2])
def test_a_run_counts_the_episodes_of_every_environment_from_its_first_on(tmp_path, groups):
    """The toy's horizon is 20 decisions, a rollout 8: the third reports the episodes that began in decisions 0 to 4."""
    changes = TOY | {"collector.num_env_groups": groups, "trainer.total_updates": 12}
    rows = start(tmp_path / "run", "toy", changes).rows
    assert [row["rollout/num_episodes"] for row in rows[:2]] == [0, 0]
    assert rows[2]["rollout/num_episodes"] >= 4
    assert sum(row["rollout/num_episodes"] for row in rows) >= 4 * (12 * 8 / 20 - 2)
    assert all(("rollout/success_rate" in row) == (row["rollout/num_episodes"] > 0) for row in rows)


def test_each_of_several_tasks_has_metrics_of_its_own():
    episodes = [Episode(0, 1.0, 10, True, 0), Episode(0, 0.0, 40, False, 1), Episode(0, 0.0, 40, False, 1)]
    row = episode_metrics(episodes, task_names=["A", "libero_spatial/3", "C"])
    assert row["rollout/success_rate"] == pytest.approx(1 / 3)
    assert (row["rollout/success_rate/A"], row["rollout/success_rate/libero_spatial/3"]) == (1.0, 0.0)
    assert row["rollout/episode_length/libero_spatial/3"] == 40.0
    assert row["rollout/num_episodes/C"] == 0.0
    assert "rollout/success_rate/C" not in row
    assert all(is_known(name) for name in row)
