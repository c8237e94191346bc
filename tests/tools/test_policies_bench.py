"""What the benchmark of policies counts, times and concludes, and what its page says."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from written_profile import make_profile

from asyncflow.config.presets import load_config
from asyncflow.envs.toy import ToyVecEnv
from asyncflow.policies.vla.policy import VLAPolicy
from asyncflow.rollout import inference
from asyncflow.rollout.plan import plan_ring

REPOSITORY = Path(__file__).parents[2]
SMALL = {
    "env.num_envs": 2,
    "env.horizon": 8,
    "buffer.buffer_size": 8,
    "algorithm.num_minibatches": 2,
    "algorithm.update_epochs": 1,
    "trainer.device": "cpu",
}
GPU = "a GPU"


@pytest.fixture(scope="module")
def frozen(tools):
    return tools("bench.policies.frozen")


@pytest.fixture(scope="module")
def settings(tools):
    return tools("bench.policies.settings")


def config_of(**changes):
    return load_config("toy_vla_tiny", SMALL | {key.replace("__", "."): value for key, value in changes.items()})


def spec_of(config):
    return ToyVecEnv(1, 2, config.env.horizon, tasks=["ToyImages"]).spec


# What an update costs.


def test_the_extent_of_an_update_counts_bootstraps_and_truncations(frozen):
    """By hand: 4 decisions of 2 environments; an episode of 8 env steps is 4 decisions, so that one is cut."""
    extent = frozen.extent_of(config_of(algorithm__update_epochs=3), horizon=8)
    assert extent == frozen.Extent(num_decisions=8, num_obs=(4 + 1 + 1) * 2, num_epochs=3)


def test_operations_of_another_extent_by_hand(frozen):
    flops = {"values": 120.0, "proximal": 80.0, "steps": 480.0}  # 10 an observation, 10 and 30 a decision
    found = frozen.flops_per_decision(flops, frozen.Extent(8, 12, 2), frozen.Extent(100, 110, 4))
    assert found == pytest.approx(10 * 1.1 + 10 + 30 * 4)


@pytest.mark.parametrize("variant", ["trained", "run_again", "kept"])
def test_operations_are_proportional_to_what_they_work_on(frozen, variant):
    """What is derived from a small update is what is counted in a larger one, of other epochs and minibatches."""
    small = config_of()
    large = config_of(buffer__buffer_size=24, algorithm__update_epochs=2, algorithm__num_minibatches=3)
    counted = [frozen.measure_updates(config, spec_of(config), variant, 1) for config in (small, large)]
    extents = [frozen.Extent(**each["extent"]) for each in counted]
    derived = frozen.flops_per_decision(counted[0]["flops"], *extents)
    assert derived == pytest.approx(sum(counted[1]["flops"].values()) / extents[1].num_decisions)
    assert derived > 0


def test_each_way_to_spare_the_backbone_costs_less(frozen):
    config = config_of()
    found = {variant: frozen.measure_updates(config, spec_of(config), variant, 1) for variant in frozen.VARIANTS}
    totals = [sum(found[variant]["flops"].values()) for variant in frozen.VARIANTS]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 3
    assert all(each["num_skipped"] == 0 for each in found.values())
    assert all(len(each["seconds"]) == 1 and each["seconds"][0] > 0 for each in found.values())


@pytest.mark.parametrize(("variant", "is_run"), [("kept", False), ("run_again", True)])
def test_only_updates_on_observations_run_the_frozen_backbone(frozen, monkeypatch, variant, is_run):
    config = config_of(policy__freeze_backbone=True)
    policy = frozen.build(config, spec_of(config))
    rollout = frozen.make_rollout(policy, spec_of(config), config, variant == "kept")
    runs, run_backbone = [], VLAPolicy._run_backbone
    monkeypatch.setattr(VLAPolicy, "_run_backbone", lambda *args: (runs.append(1), run_backbone(*args))[1])
    frozen.CountedPPO(policy, config.algorithm).update(rollout, 1, lambda: None)
    assert bool(runs) is is_run


@pytest.mark.parametrize("is_encoded", [False, True])
def test_rollouts_have_the_shapes_of_the_ring(frozen, is_encoded):
    config = config_of(policy__freeze_backbone=is_encoded)
    spec = spec_of(config)
    policy = frozen.build(config, spec)
    rollout = frozen.make_rollout(policy, spec, config, is_encoded)
    ring = plan_ring(policy, spec, 2, 4, num_slots=1).allocate(torch.device("cpu"))[0]

    def shapes(tensors):
        leaves = tensors.items(include_nested=True, leaves_only=True)
        return {name: (value.shape, value.dtype) for name, value in leaves}

    assert shapes(rollout.data) == shapes(ring["data"])
    assert shapes(rollout.obs) == shapes(ring["obs"])
    assert shapes(rollout.final_obs) == shapes(ring["final_obs"])


def test_bytes_planned_for_one_environment_are_those_of_all(frozen):
    config = config_of(policy__freeze_backbone=True)
    spec = spec_of(config)
    plan = plan_ring(frozen.build(config, spec), spec, 2, 4, num_slots=2)
    found = frozen.plan_bytes(config, spec, 2)
    assert found == {"obs_bytes": plan.obs.bytes() // 2, "ring_bytes": plan.num_bytes}


def test_the_ring_is_planned_for_each_thing_that_may_be_kept(tools, frozen, monkeypatch):
    parts, config = tools("bench.policies.parts"), config_of()
    monkeypatch.setattr(parts, "isolated", lambda function, *arguments: function(*arguments))
    rings = {kept: found["obs_bytes"] for kept, found in parts.plan_rings(config, spec_of(config)).items()}
    assert rings["features, float32"] == 2 * rings["features, bfloat16"]
    assert rings["pictures"] == spec_of(config).empty_obs(1).bytes()


# What a decision costs.


def test_decisions_are_timed_in_every_way_that_the_device_allows(tools, monkeypatch):
    monkeypatch.setattr(inference, "BACKEND", "eager")
    timing, config = tools("bench.policies.inference"), config_of(policy__freeze_backbone=True)
    eager, compiled = timing.measure_decisions(config, spec_of(config), 3, num_decisions=4)
    assert (eager["mode"], compiled["mode"]) == ("none", "compile")
    assert eager["build_s"] is None
    assert compiled["build_s"] > 0
    for row in (eager, compiled):
        assert (row["num"], row["num_envs"]) == (4, 3)
        assert 0 < row["low_s"] <= row["median_s"] <= row["high_s"]


def test_warm_up_is_in_no_time(tools, monkeypatch):
    timing, config = tools("bench.policies.inference"), config_of()
    policy = timing.build(config, spec_of(config))
    calls = []

    def decide(obs, noise):
        calls.append(len(noise))
        return policy.sample_actions(obs, "train", noise)

    obs = timing.randomised(spec_of(config).empty_obs(2))
    seconds = timing.time_decisions(policy, decide, obs, torch.zeros(2, policy.noise_size), 4)
    assert len(seconds) == 4
    assert len(calls) == 4 + timing.NUM_WARMUP


def test_a_spread_is_median_and_deciles(tools):
    found = tools("bench.policies.inference").spread_of([float(x) for x in range(11)])
    assert found == {"median_s": 5.0, "low_s": 1.0, "high_s": 9.0, "num": 11}


def test_the_compiler_finds_nothing_cached_and_its_folder_is_put_back(tools, monkeypatch):
    timing = tools("bench.policies.inference")
    monkeypatch.setenv(timing.CACHE, "/before")
    with timing.fresh_compiler_cache():
        folder = Path(os.environ[timing.CACHE])
        assert folder.is_dir()
        assert not list(folder.iterdir())
    assert os.environ[timing.CACHE] == "/before"
    assert not folder.exists()


# What is measured.


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("is_tiny", [False, True])
def test_every_part_that_can_be_measured_is_a_configuration(tools, settings, device, is_tiny):
    chosen = settings.choose_settings(device, is_tiny)
    parts = tools("bench.policies.run").choose_parts(None, chosen)
    configs = [settings.load(chosen.of(part)["preset"], tuple(chosen.of(part)["overrides"])) for part in parts]
    assert {config.policy.kind for config in configs} == {"flow", "vla"}
    assert any(config.policy.freeze_backbone for config in configs)
    assert any(part.endswith("_base") and not part.startswith("frozen") for part in parts) is (device == GPU)
    assert all(config.env.task.startswith("Toy") for config in configs) is is_tiny


def test_without_a_gpu_what_needs_one_is_refused_in_a_line(tools, settings):
    choose_parts, chosen = tools("bench.policies.run").choose_parts, settings.choose_settings("cpu", is_tiny=False)
    assert choose_parts(["inference_tiny", "profile_mlp"], chosen) == ["profile_mlp", "inference_tiny"]
    with pytest.raises(SystemExit, match="--part profile_base: needs a GPU"):
        choose_parts(["profile_base"], chosen)


def test_what_a_tiny_call_measured_is_not_taken_for_the_real_thing(tools, settings, tmp_path):
    records, tiny = tools("bench.common.records"), settings.choose_settings("cpu", is_tiny=True)
    place = records.choose_place(settings.NAME, tmp_path, is_tiny=True)
    records.write_record(place, "frozen_base", tiny, {}, 1.0)
    assert records.is_measured(place, "frozen_base", tiny)
    full = settings.choose_settings("cpu", is_tiny=False)
    for other in (full, replace(full, device=GPU)):
        with pytest.raises(SystemExit, match="other settings"):
            records.is_measured(place, "frozen_base", other)


# What follows.


def updates(seconds, flops):
    """Return figures by hand: seconds and operations of each variant."""
    extent = {"num_decisions": 4, "num_obs": 6, "num_epochs": 1}
    made = {
        variant: {"seconds": [s], "flops": {"values": 0.0, "proximal": 0.0, "steps": f}, "extent": extent}
        for variant, s, f in zip(("trained", "run_again", "kept"), seconds, flops, strict=True)
    }
    ring = {"pictures": {"obs_bytes": 1000, "ring_bytes": 10**6}, "features": {"obs_bytes": 2500, "ring_bytes": 10**7}}
    preset = {"num_decisions": 960, "num_obs": 1008, "num_epochs": 4}
    return {"updates": made, "preset": preset, "ring": ring}


@pytest.mark.parametrize(
    ("seconds", "flops", "verdicts"),
    [
        ((9.0, 6.0, 2.0), (90.0, 60.0, 19.0), [True, True, True, True]),
        ((9.0, 6.0, 2.01), (90.0, 60.0, 19.0), [True, True, False, True]),
        ((9.0, 6.0, 2.0), (90.0, 60.0, 31.0), [True, False, True, False]),
    ],
)
def test_a_third_of_either_update_is_the_limit_in_seconds_and_in_operations(tools, seconds, flops, verdicts):
    found = tools("bench.policies.judge").judge_frozen(updates(seconds, flops))
    assert [row.is_met for row in found] == verdicts
    assert found[0].measured == f"{seconds[2] / seconds[0]:.3f}: {seconds[2]:.2f} of 9.00 s"


def test_another_size_is_reported_and_not_judged(tools):
    found = tools("bench.policies.judge").judge_frozen(updates((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)), is_judged=False)
    assert {row.target for row in found} == {tools("bench.common.report").REPORTED}
    assert all(row.is_met for row in found)


def decisions(*modes):
    spread = {"low_s": 0.001, "high_s": 0.004, "num": 200}
    times = {"none": 0.002, "compile": 0.0015, "graph": 0.0011}
    return [
        {"mode": mode, "num_envs": num_envs, "build_s": None if mode == "none" else 12.5, "median_s": times[mode]}
        | spread
        for num_envs in (16, 1)
        for mode in modes
    ]


@pytest.fixture
def write(tools, settings, tmp_path):
    """Return a function that writes records of a device and then the page; it returns the page and the findings."""
    records = tools("bench.common.records")

    def write_page(device, figures):
        place = records.choose_place(settings.NAME, tmp_path, is_tiny=True)
        for part, found in figures.items():
            records.write_record(place, part, settings.choose_settings(device, is_tiny=False), found, 60.0)
        written = records.read_records(place, tools("bench.policies.parts").PARTS)
        findings = tools("bench.policies.page").write_page(place, written)
        return place.page.read_text(), findings

    return write_page


def test_the_page_says_what_a_machine_without_a_gpu_cannot(write):
    figures = {
        "profile_mlp": {"command": "asyncflow profile --config lift", "profile": make_profile()},
        "inference_mlp": {"decisions": decisions("none", "compile")},
        "frozen_base": updates((9.0, 6.0, 2.0), (9e9, 6e9, 2e9)),
    }
    page, findings = write("cpu", figures)
    assert "**No GPU here.**" in page
    assert "- Device of the policies: cpu\n" in page
    assert "# asyncflow profile --config lift\n" in page
    assert "| `base` VLA | needs a GPU |" in page
    assert "| `tiny` VLA | not measured yet |" in page
    assert "| MLP | 16 | 2.00 (1.00 to 4.00) | 1.50 (1.00 to 4.00) | 12.5 | needs a GPU |  |" in page
    assert "- MLP: only making both faster gains more." in page
    assert len(findings) == 4
    assert all(f"| {found.what} | {found.measured} | {found.target} | yes |" in page for found in findings)
    assert "| `base` | frozen, run again by the update | 6.00 | 0.667 | 6.00 | 0.667 | 6.00 | 0.667 |" in page
    assert "| `base` | features | 2,500 bytes | 10 MB | 2.50 |" in page
    assert "- `base`: 4 decisions, values of 6 observations, 1 epoch, timed once" in page


def test_both_modes_stand_in_one_row_with_the_shares_of_the_ceilings(write):
    page, _ = write("cpu", {"profile_mlp": {"command": "asyncflow profile", "profile": make_profile()}})
    times = ["5000.0 / 5000.0", "5000.0 / 5000.0", "5.00 / 5.00", "5.00 / 5.00", "9.0 / 9.0"]
    ceilings = ["1.960 (1.950 to 1.970)", "2.000 (98 %)", "1.923 (102 %)"]
    assert f"| {' | '.join(['MLP', *times, *ceilings])} |" in page


def test_with_a_gpu_nothing_is_excused_by_its_absence(write):
    page, _ = write(GPU, {"inference_base": {"decisions": decisions("none", "compile", "graph")}})
    assert "No GPU here" not in page
    assert "needs a GPU" not in page
    assert "| `base` VLA | 1 | 2.00 (1.00 to 4.00) | 1.50 (1.00 to 4.00) | 12.5 | 1.10 (1.00 to 4.00) | 12.5 |" in page
    assert "| MLP | not measured yet |" in page


def test_a_missed_target_ends_with_1(tools, settings, tmp_path, capsys):
    records, chosen = tools("bench.common.records"), settings.choose_settings("cpu", is_tiny=False)
    place = records.choose_place(settings.NAME, tmp_path, is_tiny=True)
    records.write_record(place, "frozen_base", chosen, updates((9.0, 6.0, 5.0), (9.0, 6.0, 2.0)), 60.0)
    assert tools("bench.policies.run").report(place, chosen) == 1
    said = capsys.readouterr().out
    assert said.startswith("missed: `base`, features kept: seconds")
    assert "not measured yet: profile_mlp" in said
    assert "profile_base" not in said


@pytest.mark.slow
def test_a_quick_call_measures_everything_and_writes_its_page(tmp_path):
    command = [sys.executable, "-m", "tools.bench.policies", "--quick", "--out", str(tmp_path)]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=hidden, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not measured yet" not in done.stdout
    page = (tmp_path / "pages" / "policies.md").read_text()
    assert "not measured yet" not in page
    assert "## What a frozen backbone saves" in page
