"""Configuration: presets load, overrides arrive, and every mistake is one line that helps."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from asyncflow.config.presets import load_config, parse_overrides, preset_names
from asyncflow.config.sections import Config, describe_keys, validate
from asyncflow.errors import ConfigError

PACKAGE = Path(__file__).parents[2] / "asyncflow"
KEYS = [key for key, *_ in describe_keys()]


def complaint(overrides: dict[str, Any], preset: str | None = None) -> str:
    """Return what a configuration is refused with; it must be one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(preset, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_loads(preset: str) -> None:
    assert load_config(preset).num_steps >= 1


def test_the_default_preset_ships() -> None:
    assert {"lift", "toy"} <= set(preset_names())
    assert load_config("lift").policy.checkpoint == "lift_flow"


def test_a_preset_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("trainer: {seed: 7, total_updates: 1}\n")
    assert load_config(str(path)).trainer.seed == 7


def test_overrides_win_over_the_preset() -> None:
    config = load_config("lift", parse_overrides(["env.horizon=99", "algorithm.clip_coef=0.2"]))
    assert (config.env.horizon, config.algorithm.clip_coef) == (99, 0.2)
    assert config.policy.checkpoint == "lift_flow"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("0.5", 0.5), ("3", 3), ("null", None), ("true", True), ("[1, 2]", [1, 2]), ("abc", "abc")],
)
def test_an_override_is_read_as_what_it_looks_like(text: str, value: object) -> None:
    assert parse_overrides([f"a.b={text}"]) == {"a.b": value}


@pytest.mark.parametrize("section", Config.model_fields)
def test_an_override_leaves_the_other_defaults_of_its_section_alone(section: str) -> None:
    key, value = next((name, default) for name, default, _ in describe_keys() if name.startswith(f"{section}."))
    assert load_config(None, {key: value}) == Config()


def test_a_value_may_contain_an_equals_sign() -> None:
    assert parse_overrides(["logging.out=runs/a=b"]) == {"logging.out": "runs/a=b"}


@pytest.mark.parametrize("argument", ["seed", "=3", "--seed", "a.b=[1"])
def test_what_is_no_override_is_quoted(argument: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides([argument])
    assert argument.split("=", maxsplit=1)[0] in str(caught.value)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("algorithm.clip_coeff", "algorithm.clip_coef"),
        ("clip_coef", "algorithm.clip_coef"),
        ("algorithms.clip_coef", "algorithm"),
        ("buffer.max_lag", "buffer.max_policy_lag"),
        ("algorithm.clip", "algorithm.clip_coef?"),
        ("clip", "algorithm.clip_coef?"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(key: str, nearest: str) -> None:
    message = complaint({key: 1})
    assert key.split(".", maxsplit=1)[0] in message
    assert f"did you mean {nearest}" in message


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("trainer.buffer_type", "vlaa", "'vla' or 'standard'"),
        ("env.num_envs", 0, "greater than or equal to 1"),
        ("env.num_envs", "16", "integer"),
        ("env.num_envs", 2**63, "at most 9223372036854775807"),
        ("env.num_envs", 1.5, "integer"),
        ("algorithm.gamma", 1.5, "less than or equal to 1"),
        ("algorithm.clip_coef", "a", "number"),
        ("buffer.max_policy_lag", 5, "less than or equal to 4"),
        ("policy.hidden_sizes", [], "at least 1"),
        ("env.obs_keys", [], "at least 1"),
        ("algorithm.decoupled", 1, "boolean"),
        ("trainer.seed", -1, "greater than or equal to 0"),
        ("trainer.num_threads", 10**6, "less than or equal to 1024"),
        ("env.step_timeout_s", 1e9, "less than or equal to 1000000"),
        ("env.restart_window_s", 1e10, "less than or equal to 1000000"),
        ("policy.num_inference_steps", 10**6, "less than or equal to 1000"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(key: str, value: object, allowed: str) -> None:
    message = complaint({key: value})
    assert f"{key} = {value!r}" in message
    assert allowed in message


NUMBERS = [key for key, default, _ in describe_keys() if type(default) in (int, float)]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("number", [2**200, 16**5000, 1e31, -1e300, float("nan"), float("inf")], ids=range(6))
def test_no_key_takes_a_number_that_what_computes_with_it_cannot_hold(key: str, number: float) -> None:
    message = complaint({key: number})
    assert message.startswith(f"{key} = ")
    assert len(message) < 300


@pytest.mark.parametrize("key", ["policy.hidden_sizes", "policy.critic_hidden_sizes"])
def test_a_wrong_element_of_a_list_is_named_with_its_place(key: str) -> None:
    assert complaint({key: [64, 0]}) == f"{key}[1] = 0: input should be greater than 0"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"env.num_envs": 7}, ["buffer.buffer_size = 960", "multiple of env.num_envs = 7"]),
        ({"algorithm.num_minibatches": 7}, ["buffer.buffer_size = 960", "algorithm.num_minibatches = 7"]),
        ({"collector.num_env_groups": 3}, ["env.num_envs = 16", "collector.num_env_groups = 3"]),
        ({"policy.n_action_steps": 5}, ["policy.n_action_steps = 5", "policy.horizon = 4"]),
        ({"policy.noise_range": [0.2, 0.1]}, ["policy.noise_range = [0.2, 0.1]"]),
        ({"buffer.on_full": "overwrite"}, ["buffer.on_full", "buffer.lag_mode = bounded"]),
        (
            {"buffer.on_full": "overwrite", "buffer.lag_mode": "bounded", "trainer.buffer_type": "standard"},
            ["buffer.on_full", "--buffer-type vla"],
        ),
        ({"trainer.total_updates": None}, ["trainer.total_updates", "trainer.total_env_steps"]),
    ],
)
def test_an_impossible_combination_names_both_keys(overrides: dict[str, Any], named: list[str]) -> None:
    message = complaint(overrides, "lift")
    assert [words for words in named if words not in message] == []


def test_a_missing_preset_names_those_that_exist() -> None:
    assert "lift" in complaint({}, "lfit")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "3"])
def test_a_preset_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert str(path) in complaint({}, str(path))


def test_a_value_where_a_section_belongs_is_refused() -> None:
    assert "env" in complaint({"env": 3})
    assert "env.num_envs.x" in complaint({"env.num_envs": 3, "env.num_envs.x": 3})


def test_a_configuration_survives_being_written_and_read() -> None:
    config = load_config("lift", {"algorithm.learning_rate": 3e-4})
    assert validate(config.model_dump()) == config


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config("lift").trainer.seed = 1


@pytest.mark.parametrize(
    ("buffer_type", "asked", "lag"), [("vla", None, 1), ("standard", None, 0), ("standard", 2, 2), ("vla", 0, 0)]
)
def test_the_lag_limit_follows_the_mode_unless_it_is_set(buffer_type: str, asked: int | None, lag: int) -> None:
    overrides = {"trainer.buffer_type": buffer_type, "buffer.max_policy_lag": asked}
    assert load_config("lift", overrides).max_policy_lag == lag


def test_a_rollout_is_steps_times_environments() -> None:
    config = load_config("lift")
    assert config.num_steps * config.env.num_envs == config.buffer.buffer_size


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_a_meaning(key: str) -> None:
    assert {name: meaning for name, _, meaning in describe_keys()}[key].endswith(".")


def attributes_read(tree: ast.AST) -> set[str]:
    """Return the names of the attributes that a piece of code reads."""
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def names_read() -> set[str]:
    """Return the attributes that the package reads; of its own files only those behind properties."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        if path.name not in ("config.py", "policy_config.py"):
            names |= attributes_read(tree)
            continue
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        for function in functions:
            if any(isinstance(each, ast.Name) and each.id == "property" for each in function.decorator_list):
                names |= attributes_read(function)
    return names


def test_every_key_is_read_somewhere() -> None:
    read = names_read()
    attributes = {"model_config": "model_kwargs"}  # pydantic keeps the former for itself
    leaves = {key: key.rsplit(".", maxsplit=1)[-1] for key in KEYS}
    assert [key for key, leaf in leaves.items() if attributes.get(leaf, leaf) not in read] == []


def test_sections_stand_in_the_documented_order() -> None:
    assert list(Config.model_fields) == ["env", "policy", "algorithm", "buffer", "collector", "trainer", "logging"]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe", b"env: \xe4", b"\x00", b"env: !!python/object/apply:os.system [touch mark]",
        b"env: !!python/name:os.system", b"env: !!int x", b"env: !!bool x", b"env: !!timestamp x",
        b"env: " + b"1" * 5000, b"[" * 1_000, b"env: *nothing", b"- env",
    ],
    ids=lambda content: repr(content[:30]),
)  # fmt: skip
def test_a_preset_that_is_no_plain_yaml_is_one_line_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_bytes(content)
    assert complaint({}, "mine.yaml").startswith("--config mine.yaml: ")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_preset_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("logging: {out: größe}", encoding="utf-8")
    assert load_config(str(tmp_path / "mine.yaml")).logging.out == "größe"


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system [touch mark]", "!!int x", "!!bool x", "[" * 1_000])
def test_an_override_that_is_no_plain_yaml_is_one_line_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"model_config: cannot read the value") as caught:
        parse_overrides([f"policy.vla.model_config={value}"])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


OLD_DEFAULTS = {
    "env": {"emulated_latency_s": 0.0},
    "policy": {"emulated_latency_s": 0.0},
    "algorithm": {"emulated_latency_s": 0.0},
    "trainer": {"emulated_spread": "constant", "emulated_variation": 0.5},
}


def test_keys_that_went_are_dropped_at_their_defaults() -> None:
    assert validate(OLD_DEFAULTS) == Config()
    assert OLD_DEFAULTS["policy"] == {"emulated_latency_s": 0.0}  # what was given stays as it was


@pytest.mark.parametrize(("key", "value"), [("env.emulated_latency_s", 0.1), ("trainer.emulated_spread", "uniform")])
def test_keys_that_went_are_refused_with_where_they_went(key: str, value: object) -> None:
    section, name = key.split(".")
    with pytest.raises(ConfigError, match=f"{key} = {value!r}: a run has no emulated stages any more; `asyncflow"):
        validate({section: {name: value}})
