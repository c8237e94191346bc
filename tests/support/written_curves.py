"""Learning curves that are written by hand, as `tools.bench.learning` leaves them."""

import json

HEAD = "updates,env_steps,wall_s,num_episodes,num_successes,success_rate,success_low,success_high,episode_length"


def write_curve(folder, condition, seed, points):
    """Write the table of a run from points of (updates, env steps, seconds, episodes, successes)."""
    rows = [",".join(map(str, (*point, point[-1] / point[-2], 0, 1, 50.0))) for point in points]
    (folder / f"learning_{condition}_seed{seed}.csv").write_text("\n".join([HEAD, *rows]) + "\n")


def write_meta(folder):
    """Write where and how they were measured."""
    meta = {
        "machine": {"processor": "Abacus", "cores": "2", "memory": "3 GiB"},
        "commits": {"learning_vla_seed0": "c0ffee", "learning_standard_seed0": "beef"},
        "commands": ["python -m tools.bench.learning --out runs/learning"],
        "versions": {"python": "3.11", "torch": "2.9"},
    }
    (folder / "learning_meta.json").write_text(json.dumps(meta))
