"""Values on the command line are read by the type of their key, and shown so that they read back the same."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from asyncflow.config.overrides import read_value, write_override, write_value
from asyncflow.config.presets import load_config, parse_overrides
from asyncflow.config.sections import describe_keys
from asyncflow.errors import ConfigError
from asyncflow.terminal import command

TEXTS = [
    "pick up cube #2", "yes", "2", "1e3", "- lift", "pick: the cube", " two  spaces ", "'quoted'", '"quoted"', "[a",
    "größe \N{SNOWMAN}", "a=b", "$HOME", "010", "1:30", "!!int x", "null", "~", "line\nline",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_taken_as_it_was_typed_and_shown_as_it_can_be_typed(text: str) -> None:
    key = "policy.vla.instruction"
    assert read_value(key, text) == text
    (argument,) = shlex.split(write_override(key, text))
    assert load_config(None, parse_overrides([argument])).policy.vla.instruction == text


@pytest.mark.parametrize("text", ["null", "None", "~", "", "nullify"])
@pytest.mark.parametrize("key", ["logging.out", "policy.statistics", "policy.vla.model_path"])
def test_a_text_of_a_key_that_may_be_null_reads_back_as_that_text(key: str, text: str) -> None:
    (argument,) = shlex.split(write_override(key, text))
    assert parse_overrides([argument]) == {key: text}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("logging.out", "run #1", "run #1"),
        ("logging.out", "null", None),
        ("logging.out", "None", None),
        ("policy.checkpoint", "", None),
        ("policy.checkpoint", "~", None),
        ("trainer.seed", "010", 10),
        ("trainer.seed", "1:30", "1:30"),
        ("trainer.seed", "\N{SUPERSCRIPT TWO}", "\N{SUPERSCRIPT TWO}"),
        ("trainer.seed", "1.5", 1.5),
        ("trainer.total_env_steps", "none", None),
        ("algorithm.clip_coef", "1e-4", 1e-4),
        ("algorithm.decoupled", "No", False),
        ("algorithm.decoupled", "0", "0"),
        ("trainer.buffer_type", "on", "on"),
        ("env.cameras", "[no, 2, 1e3, a b]", ["no", "2", "1e3", "a b"]),
        ("policy.noise_range", "[1e-2, .2]", [1e-2, 0.2]),
        ("policy.hidden_sizes", "[8, 16]", [8, 16]),
        ("policy.vla.model_config", "{width: 8}", {"width": 8}),
        ("policy.vla.model_config.width", "8", 8),
        ("policy.vla.model_kwargs.scale", "1e-3", 1e-3),
        ("policy.mapping.obs.images", "{front: on}", {"front": "on"}),
        ("policy.mapping.obs.images.front", "2", "2"),
        ("policy.mapping.action.select", "null", None),
        ("policy.vla", "{size: base}", {"size": "base"}),
        ("no.such.key", "3", 3),
    ],
)
def test_every_other_value_is_read_by_its_keys_type(key: str, text: str, value: Any) -> None:
    read = read_value(key, text)
    assert (read, type(read)) == (value, type(value))


def test_every_default_reads_back_as_it_is_shown() -> None:
    for key, default, _ in describe_keys():
        assert (key, read_value(key, write_value(default))) == (key, default)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("env.cameras", ["agentview", "no", "a, b", "it's", "größe", "\N{GRINNING FACE}", "#1"]),
        ("policy.vla.model_config", {"width": 8, "name": "yes", "rate": 1e-05, "inner": {"a": [None, True, "1e3"]}}),
        ("policy.mapping.obs.state", [{"key": "robot0_eef_pos", "slice": [0, 3]}]),
        ("policy.noise_range", [1e-05, 0.1]),
    ],
)
def test_lists_and_mappings_read_back_as_they_are_shown(key: str, value: Any) -> None:
    (argument,) = shlex.split(write_override(key, value))
    assert parse_overrides([argument]) == {key: value}


@pytest.mark.parametrize("name", ["a b", "#1", "it's", "-x", "~/x", "$HOME", "größe"])
def test_a_path_in_a_command_means_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of")
    _, word = shlex.split(command(Path(name)))
    assert not word.startswith("-")
    assert Path(load_config(None, {"logging.out": word}).logging.out or "") == Path(name)


@pytest.mark.parametrize("key", ["logging.out", "policy.checkpoint", "env.env_meta", "policy.vla.model_path"])
def test_a_home_folder_is_meant_in_every_path(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of")
    section, *_, name = key.split(".")
    config = load_config(None, parse_overrides([f"{key}=~/x"]))
    part = config.policy.vla if name == "model_path" else getattr(config, section)
    assert getattr(part, name) == "/home/of/x"


@pytest.mark.parametrize("text", ["a\0b", "a\udcffb"])
def test_a_text_that_no_file_can_hold_is_one_line(text: str) -> None:
    values = {"logging.out": text, "env.cameras": ["front", text], "policy.vla.model_config": {"a": {text: 1}}}
    for key, value in values.items():
        with pytest.raises(ConfigError, match=f"{key} = ") as caught:
            load_config(None, {key: value})
        assert str(caught.value).isascii()
        assert "\n" not in str(caught.value)
