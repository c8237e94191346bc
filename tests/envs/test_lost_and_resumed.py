"""A run cut while an environment was lost, and the policy not yet told, equals the uncut one, bit for bit."""

from functools import partial

from fake_simulator import MortalSimulator
from inline_worker import simulators, work_inline
from silent import TOY, assert_equal, go_on, outcome, start

from asyncflow.run import parts
from asyncflow.run.checkpoint import list_checkpoints, load_checkpoint
from asyncflow.seeding import derive_seed

DOOMED = derive_seed(0, "episode", 1, 1)  # of environment 1: decisions 5 to 9, of which the rollout ends with 7


def test_an_environment_lost_at_a_rollouts_end_is_reported_by_the_resumed_run(tmp_path, monkeypatch):
    """Its worker dies for the second group, after the first group's last chunk was received."""
    work_inline(monkeypatch)
    monkeypatch.setattr(parts, "make_vec_env", simulators(partial(MortalSimulator, DOOMED)))
    changes = TOY | {"env.num_workers": 2, "collector.num_env_groups": 2, "trainer.total_updates": 2}
    start(tmp_path / "uncut", "toy", changes)
    start(tmp_path / "cut", "toy", changes, stop_at=1)
    cut = load_checkpoint(list_checkpoints(tmp_path / "cut")[-1])
    assert cut.groups["journal"]["is_lost"].tolist() == [True, False, False, False]
    go_on(tmp_path / "cut")
    assert_equal(outcome(tmp_path / "uncut"), outcome(tmp_path / "cut"))
