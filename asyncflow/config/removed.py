"""Keys that earlier versions had: their defaults, and what takes their place."""

from __future__ import annotations

from typing import Any

MAX_SHOWN = 200  # characters of a value in a refusal

# Keys of version 0.1.0: their defaults, and what takes their place.
REMOVED: dict[str, tuple[Any, str]] = {
    "env.emulated_latency_s": (0.0, "`asyncflow profile --env-latency-s` has them"),
    "policy.emulated_latency_s": (0.0, "`asyncflow profile --inference-latency-s` has them"),
    "algorithm.emulated_latency_s": (0.0, "`asyncflow profile --update-latency-s` has them"),
    "trainer.emulated_spread": ("constant", "`asyncflow profile --spread` has them"),
    "trainer.emulated_variation": (0.5, "`asyncflow profile --variation` has them"),
}


def take_removed(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return nested values without keys of version 0.1.0 that are gone, and a line about each that had been changed."""
    kept, told = dict(values), []
    for key, (default, now) in REMOVED.items():
        section, _, name = key.partition(".")
        if isinstance(kept.get(section), dict) and name in kept[section]:
            if kept[section][name] != default:
                told.append(f"{key} = {show(kept[section][name])}: a run has no emulated stages any more; {now}")
            kept[section] = {other: value for other, value in kept[section].items() if other != name}
    return kept, told


def show(value: Any) -> str:
    """Return a value as it is written, cut where a file made it endless."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a huge number"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
