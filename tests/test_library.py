"""The library's door: what `import asyncflow` shows, what it costs, and that a program on it is checked by types."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from silent import TOY, start

import asyncflow as af
from asyncflow.config.presets import load_config
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.run.evaluate_file import evaluate_checkpoint

REPOSITORY = Path(__file__).parent.parent
SLOW = {"torch", "tensordict", "pydantic", "yaml", "rich", "typer", "numpy", "robosuite", "robomimic", "h5py"}

TIMED = """
import resource, sys, time
start, cpu = time.perf_counter(), time.process_time()
import asyncflow
print(time.process_time() - cpu, *sorted(sys.modules))
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_importing_it_takes_no_time_and_loads_nothing_slow():
    runs = [run_python("-c", TIMED).stdout.split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in runs) < 0.05
    assert SLOW & set(runs[0]) == set()


def test_help_answers_at_once():
    code = "import sys; from asyncflow.cli import run; run(['--help']); print(*sorted(sys.modules), file=sys.stderr)"
    shown = run_python("-c", code)
    assert "Usage" in shown.stdout
    assert {"torch", "tensordict", "pydantic", "yaml", "numpy", "robosuite"} & set(shown.stderr.split()) == set()


@pytest.mark.parametrize("name", af.__all__)
def test_every_public_name_is_there_and_has_a_docstring(name):
    thing = getattr(af, name)
    assert name in ("BufferType", "__version__") or (thing.__doc__ or "").strip()


def test_the_names_are_those_that_type_checkers_see():
    stated = re.findall(
        r"from asyncflow\.\S+ import ([^(\n]+|\([^)]+\))", (REPOSITORY / "asyncflow/__init__.py").read_text()
    )
    seen = {name for names in stated for name in re.findall(r"\w+", names)}
    assert seen == set(af.__all__) - {"__version__"}
    assert dir(af) == sorted(af.__all__)


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match=r"no attribute 'Traner'; docs/library\.md lists"):
        importlib.import_module("asyncflow").Traner  # noqa: B018


def test_the_page_has_every_public_name_and_no_other():
    page = (REPOSITORY / "docs" / "library.md").read_text()
    named = set(re.findall(r"^\| `(?:af\.)?(\w+)", page, flags=re.MULTILINE))
    assert named == set(af.__all__)


def test_the_pages_loop_of_ones_own_trains():
    page = (REPOSITORY / "docs" / "library.md").read_text()
    (code,) = re.findall(r"## A loop of your own\n.*?```python\n(.*?)```", page, flags=re.DOTALL)
    torch.manual_seed(0)
    names = {"af": af}
    exec(code, names)
    untrained = af.make_policy("gaussian", names["env"])
    assert len(names["rows"]) == 16 * names["buffer"].capacity
    assert not torch.equal(names["policy"].log_std, untrained.log_std)


@pytest.mark.slow
def test_a_program_is_checked_by_types(tmp_path):
    """A user's own script, strictly; mistakes in another are found."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import asyncflow as af\n\naf.Trainer(af.load_policy('x'), 'Lift')\naf.Traner\n")
    options = ["--strict", "--no-incremental", "--config-file=", "--follow-imports=silent"]
    checked = run_python(
        "-m", "mypy", *options, "examples/library.py", "examples/my_env.py", "examples/my_policy.py", str(wrong)
    )
    *lines, end = checked.stdout.splitlines()
    first, second = (line.partition(": ")[2] for line in lines)
    assert first == 'error: Argument 2 to "Trainer" has incompatible type "str"; expected "VecEnv"  [arg-type]'
    assert second.startswith('error: Module has no attribute "Traner"')  # and what may have been meant
    assert "in 1 file (checked 4 source files)" in end


def test_the_example_trains_saves_and_goes_on(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    result = importlib.import_module("library").main("Toy", 2)
    assert result.num_episodes == 16
    assert re.findall(r"update (\d)", capsys.readouterr().out) == ["1", "2", "3"]


def test_a_policy_of_ones_own_ends_equal_with_both_buffer_types(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    main = importlib.import_module("my_policy").main
    vla, standard = (main(2, buffer_type) for buffer_type in ("vla", "standard"))
    assert vla.progress.updates == 2
    weights = zip(vla.policy.parameters(), standard.policy.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_an_evaluation_is_that_of_the_command_line(tmp_path):
    start(tmp_path / "run", "toy", TOY)
    policy = af.load_policy(tmp_path / "run")
    result = af.evaluate(policy, "Toy", 6, num_envs=4)
    config = load_config("toy", TOY)
    assert result.as_metrics() == evaluate_checkpoint(str(tmp_path / "run"), config, 6).as_metrics()


def test_environments_are_those_of_the_tasks_preset():
    env = af.make_env("Toy", num_envs=3)
    assert (env.num_envs, env.n_action_steps, env.spec.horizon) == (3, 2, ToyVecEnv(3, 2).spec.horizon)
    assert af.make_env("Toy", num_envs=7, n_action_steps=5, horizon=11).n_action_steps == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"task": "Lfit"}, "Lift"),
        ({"task": "Toy", "horizn": 3}, "unknown key env.horizn; did you mean env.horizon"),
        ({"task": "Toy", "num_envs": 0}, "env.num_envs = 0"),
        ({"task": "Toy", "n_action_steps": 0}, r"n_action_steps=0\): must be a whole number, at least 1"),
    ],
)
def test_a_wrong_argument_of_an_environment_is_named(arguments, said):
    with pytest.raises(af.ConfigError, match=said):
        af.make_env(**arguments)


def test_a_policys_settings_are_checked():
    spec = ToyVecEnv(1, 2).spec
    with pytest.raises(af.ConfigError, match=r"unknown key policy.hiden_sizes; did you mean policy.hidden_sizes"):
        af.make_policy("gaussian", spec, hiden_sizes=[8])
    with pytest.raises(af.ConfigError, match=r"policy.kind = 'gausian': not known"):
        af.make_policy("gausian", spec)
    with pytest.raises(af.CheckpointError, match="checkpoint nowhere: not found"):
        af.load_policy("nowhere")


def test_a_loaded_policy_takes_other_settings():
    policy = af.load_policy("lift_flow", noise_method="flow_sde", noise_level=0.3)
    assert policy.made_from is not None
    assert (policy.made_from.noise_method, policy.made_from.noise_level) == ("flow_sde", 0.3)


def test_an_untrained_policy_is_the_same_for_the_same_seed():
    env = af.make_env("Toy", num_envs=2)
    first, same, other = (af.make_policy("gaussian", env, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.sim
def test_lift_is_built_as_the_shipped_policy_was_made_and_evaluated():
    policy = af.load_policy("lift_flow")
    env = af.make_env("Lift", num_envs=2, policy=policy, num_workers=1)
    try:
        assert env.spec.horizon == 120
        assert env.n_action_steps == policy.n_action_steps
        assert 0 <= af.evaluate(policy, env, 2).success_rate <= 1
    finally:
        env.close()


def test_what_is_no_environment_or_no_policy_is_refused_in_one_line():
    with pytest.raises(af.ConfigError, match="expected environments, such as make_env"):
        af.make_policy("gaussian", "Toy")
    with pytest.raises(af.ConfigError, match="PPO's first argument is a ToyVecEnv; expected a Policy"):
        af.PPO(af.make_env("Toy", num_envs=2))
