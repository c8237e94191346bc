"""A policy that is told which of two goals is meant learns to reach it; one that is not told cannot."""

import pytest
from silent import start

TRAINED = {"trainer.device": "cpu", "trainer.eval_interval": 60, "trainer.eval_episodes": 200, "logging.logger": "none"}


def success_of(folder, **changes):
    """Train the preset as it is, which takes minutes; return its success at the end."""
    return start(folder, "toy_language", TRAINED | changes).rows[-1]["eval/success_rate"]


@pytest.mark.slow
def test_the_tiny_vla_learns_from_scratch_to_do_what_it_is_told(tmp_path):
    assert success_of(tmp_path / "run") >= 0.9


@pytest.mark.slow
def test_without_the_instruction_it_cannot(tmp_path):
    """Either goal ends the episode: without it the right one is reached in half of them at best."""
    assert success_of(tmp_path / "run", **{"policy.vla.instruction": "go"}) <= 0.6
