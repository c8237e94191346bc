"""What YAML and JSON from strangers may hold: aliases that explode and endless nesting are refused at once."""

from __future__ import annotations

import time

import pytest
import yaml

from asyncflow.config.plain_values import MAX_DEPTH, is_deep, load_yaml
from asyncflow.config.presets import load_config, parse_overrides
from asyncflow.errors import ConfigError

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MERGED = "a0: &a0 {k0: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 10))


@pytest.mark.parametrize(
    "text", ["", "a: 1", "a: &x [1, 2]\nb: *x", "a: &x {k: 1}\nb: {<<: *x, l: 2}", "[1, null, 2.5]"]
)
def test_yaml_means_what_it_means(text: str) -> None:
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "text", [BOMB, MERGED, "a: &a [*a]", "[" * 70 + "]" * 70], ids=["lists", "merged", "own", "deep"]
)
def test_aliases_that_explode_and_endless_nesting_are_refused_in_one_short_line(tmp_path, text: str) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    start = time.perf_counter()
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    assert time.perf_counter() - start < 1
    assert str(error.value).startswith(f"--config {path}: not valid YAML: ")
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def test_a_value_on_the_command_line_is_no_bomb_either() -> None:
    with pytest.raises(ConfigError, match=r"env\.cameras: cannot read the value"):
        parse_overrides([f"env.cameras={{{BOMB.replace(chr(10), ',')}}}"])


def test_values_as_deep_as_the_limit_are_not_deep() -> None:
    value: object = 1
    for _ in range(MAX_DEPTH - 1):
        value = [value]
    assert not is_deep(value)
    assert is_deep({"key": [value]})
