"""The example of an environment of one's own runs as a script does, and both of its carts are the same cart."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import asyncflow as af

pytest.importorskip("gymnasium")

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_example_trains_in_both(tmp_path: Path) -> None:
    words = [sys.executable, str(EXAMPLES / "my_env.py"), "1"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=os.environ, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("GymVecEnv: success 0.")
    assert second.startswith("SimulatorVecEnv: success 0.")


def test_both_carts_move_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from my_env import CartEnv, CartSimulator  # noqa: PLC0415

    env, simulator = CartEnv(), CartSimulator(0)
    obs, _ = env.reset(seed=3)
    simulator.reset(0)
    simulator.cart.place = env.cart.place
    for _ in range(60):
        action = np.array([np.clip(-2 * obs[0] - 8 * obs[1], -1, 1)], np.float32)
        obs, reward, terminated, _, info = env.step(action)
        assert simulator.step(action) == (reward, terminated)
        assert simulator.observe().tolist() == obs.tolist()
        if terminated:
            break
    assert terminated
    assert info["is_success"]


def test_the_library_has_both() -> None:
    assert issubclass(af.GymVecEnv, af.SimulatorVecEnv)
    assert issubclass(af.SimulatorVecEnv, af.VecEnv)
