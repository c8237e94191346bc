"""A profile, as `profile.json` holds it, that is written by hand."""


def speedup(value, half=0.01):
    return {"value": value, "low": value - half, "high": value + half}


def leg(block, mode, seconds, collect_s, trainer_s):
    return {"block": block, "mode": mode, "seconds": seconds, "collect_s": collect_s, "trainer_s": trainer_s}


def make_profile(value=1.96, modes=("standard", "vla")):
    """Return a profile of two blocks: 10 s in turn, 5.2 s contended, 5.3 s reached."""
    names = ("collect", "env", "policy", "trainer", "chunk", "inference")
    stages = {name: {"mean_s": 5.0, "std_s": 0.1, "num": 6} for name in names}
    legs = [leg(block, *one) for block in (0, 1) for one in (("standard", 30.0, 5, 5), ("vla", 15.9, 5.2, 5.1))]
    return {
        "alone": {"collect_s": 5.0, "update_s": 5.0},
        "speedup": {mode: speedup(value) for mode in modes if mode != "vla"},
        "ceilings": {
            "ideal": {"two_stage": 2.0, "three_stage": 3.0},
            "contended": {"two_stage": 10 / 5.2, "three_stage": 2.8},
        },
        "predicted": 2.0,
        "advice": "only making both faster gains more",
        "legs": legs,
        "modes": {mode: {"stages": stages, "decisions_per_s": 9.0, "decisions_per_s_std": 0.1} for mode in modes},
    }
