"""The page on instructions says what the data say."""

import pytest

from tools.bench.language.page import describe_rows, judge


def record(condition, seed, *rates):
    curve = [
        {
            "updates": 10 * n,
            "env_steps": 1000 * n,
            "success_rate": rate,
            "episode_length": 9.0,
            "tasks": {"ToyGreen": rate, "ToyBlue": rate},
        }
        for n, rate in enumerate(rates)
    ]
    return {"condition": condition, "seed": seed, "curve": curve}


@pytest.mark.parametrize(
    ("records", "verdicts"),
    [
        ([record("told", 0, 0.1, 0.95), record("told", 1, 0.0, 0.92), record("untold", 0, 0.0, 0.5)], ["yes", "yes"]),
        ([record("told", 0, 0.1, 0.95), record("told", 1, 0.0, 0.7)], ["**no**"]),
        ([record("untold", 0, 0.1, 0.95)], ["**no**"]),
    ],
)
def test_a_condition_is_judged_by_its_worst_seed(records, verdicts):
    assert [found.verdict for found in judge(records)] == verdicts


def test_a_row_says_when_the_target_was_reached():
    row = describe_rows([record("told", 0, 0.1, 0.95, 0.91)]).splitlines()[-1]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "with the instruction", "0", "91.0 %", "91.0 %", "91.0 %", "9.0", "1,000", "2,000"
    ]  # fmt: skip
