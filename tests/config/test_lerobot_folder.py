"""A LeRobot folder is recognised, and refused where it cannot be read or does not fit, without LeRobot."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
from silent import TOY, Silent

from asyncflow.config.lerobot_folder import (
    choose_statistics,
    match_cameras,
    open_lerobot,
    read_lerobot_folder,
    select_statistics,
    with_export,
)
from asyncflow.config.observations import make_field
from asyncflow.config.policy import MappingConfig
from asyncflow.config.presets import load_config
from asyncflow.config.sections import PolicyConfig
from asyncflow.envs.mapping import NameMapping
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.policies.policy_file import resolve_checkpoint
from asyncflow.run.build import check_start
from asyncflow.run.launch import train
from asyncflow.simulators.spec import EnvSpec

FEATURES = {
    "observation.images.top": {"type": "VISUAL", "shape": [3, 28, 28]},
    "observation.images.wrist": {"type": "VISUAL", "shape": [3, 28, 28]},
    "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 480, 640]},
    "observation.state": {"type": "STATE", "shape": [4]},
}
CONFIG = {
    "type": "smolvla",
    "input_features": FEATURES,
    "output_features": {"action": {"type": "ACTION", "shape": [2]}},
    "chunk_size": 50,
}
SHAPES = {"state": (4,)}
CAMERAS = {"top": (3, 28, 28), "wrist": (3, 28, 28)}


@pytest.fixture
def folder(tmp_path):
    """A folder without weights that could be loaded."""
    path = tmp_path / "policy"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "model.safetensors").touch()
    return path


def change(path, **changes):
    (path / "config.json").write_text(json.dumps(CONFIG | changes))


def as_images(shapes):
    return {f"images.{camera}": shape for camera, shape in shapes.items()}


def match(folder, config=None, shapes=SHAPES, action_dim=2, cameras=CAMERAS):
    obs = {key: make_field(key, shape) for key, shape in (shapes | as_images(cameras)).items()}
    return match_cameras(read_lerobot_folder(folder), config or PolicyConfig(), obs, action_dim)


def test_a_folder_given_as_checkpoint_sets_the_kind_whatever_the_preset(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    policy = load_config("lift", {"policy.checkpoint": "policy", "policy.freeze_backbone": True}).policy
    assert (policy.kind, policy.checkpoint) == ("lerobot", str(folder))


@pytest.mark.parametrize("name", ["lift_flow", "nowhere", "", "~nobody_of_this_name/x"])
def test_other_checkpoints_are_left_alone(name):
    assert load_config("lift", {"policy.checkpoint": name}).policy.kind == "flow"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "llama"}', "[" * 100_000])
def test_other_configurations_are_no_policy_folder(folder, text):
    (folder / "config.json").write_text(text)
    assert load_config("lift", {"policy.checkpoint": str(folder)}).policy.kind == "flow"


@pytest.mark.parametrize("inside", ["lerobot", "checkpoints/last/lerobot"])
def test_of_a_run_the_folder_that_it_wrote_is_named(tmp_path, inside):
    (tmp_path / inside).mkdir(parents=True)
    with pytest.raises(
        CheckpointError, match=f"not a LeRobot policy folder: .*; of this run, {tmp_path / inside} is one"
    ):
        read_lerobot_folder(tmp_path)


def test_cameras_may_have_lerobots_names_or_short_ones(folder):
    full = {"observation.images.top": (3, 28, 28), "wrist": (3, 28, 28)}
    assert match(folder) == {"observation.images.top": "top", "observation.images.wrist": "wrist"}
    assert match(folder, cameras=full)["observation.images.top"] == "observation.images.top"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "act"}, r"a LeRobot policy of type 'act'; asyncflow reads: smolvla, pi0$"),
        ({"type": ["smolvla"]}, r"a LeRobot policy of type \['smolvla'\]; asyncflow reads"),
        ({"type": "pi0"}, r"lacks something that asyncflow needs .*, n_action_steps\): KeyError"),
        ({"type": "pi0", "n_action_steps": 0}, r"n_action_steps = 0 in config.json; at least 1 is needed"),
        ({"adapt_to_pi_aloha": True}, r"adapt_to_pi_aloha = true"),
        ({"input_features": {}}, r"lacks something that asyncflow needs .*KeyError: 'observation.state'"),
        ({"output_features": None}, r"lacks something that asyncflow needs"),
        ({"chunk_size": float("inf")}, r"lacks something that asyncflow needs .*OverflowError"),
        ({"chunk_size": 0}, r"chunk_size = 0 in config.json; at least 1 is needed"),
        ({"input_features": {"observation.state": FEATURES["observation.state"]}}, r"names no pictures"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_line(folder, changes, message):
    change(folder, **changes)
    assert_refused(folder, message)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "has no model.safetensors")


def test_a_folder_of_a_newer_lerobot_is_refused(folder):
    (folder / "policy_preprocessor.json").touch()
    assert_refused(folder, "written by LeRobot 0.4 or later, which keeps the normalisation apart")


def assert_refused(folder, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_lerobot_folder(folder)
    assert str(caught.value).startswith(f"policy.checkpoint = {folder}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"config": PolicyConfig(horizon=51)}, r"policy.horizon = 51: .* predicts chunks of 50; use at most that"),
        ({"shapes": {"state": (19,)}}, r"observation.state has 4 numbers, .* state has the shape \[19\]"),
        ({"shapes": {"state": (2, 4)}}, r"the environment's state has the shape \[2, 4\]; see .*env.n_obs_steps"),
        ({"action_dim": 7}, r"actions have 2 numbers, the environment's 7"),
        ({"shapes": SHAPES | {"points.top": (64, 6)}}, r"env.point_clouds = \['top'\]: .* sees no point clouds; use"),
        ({"cameras": {}}, r"the environment's: none; missing: top, wrist; not the model's: none"),
        ({"cameras": CAMERAS | {"side": (3, 28, 28)}}, r"missing: none; not the model's: side"),
    ],
)
def test_what_does_not_fit_is_one_line(folder, keys, message):
    with pytest.raises(ConfigError, match=message) as caught:
        match(folder, **keys)
    assert "\n" not in str(caught.value)


def test_a_chunk_of_smolvla_can_be_shortened_and_one_of_pi0_not(folder):
    match(folder, PolicyConfig(horizon=20, n_action_steps=4))
    change(folder, type="pi0", n_action_steps=20, chunk_size=50)
    match(folder, PolicyConfig(horizon=20, n_action_steps=4))
    message = (
        r"^policy.horizon = 19: .* predicts chunks of 20, and type pi0 no others; use 20, and "
        "policy.n_action_steps to execute fewer$"
    )
    with pytest.raises(ConfigError, match=message):
        match(folder, PolicyConfig(horizon=19, n_action_steps=4))


SEEN = {"agentview_image": "observation.images.top", "robot0_eye_in_hand": "wrist"}
MAPPED = {
    "policy.mapping.obs.images": SEEN,
    "policy.mapping.obs.state": [{"key": "robot0_eef_pos"}, {"key": "robot0_gripper_qpos", "slice": [0, 1]}],
    "policy.mapping.action": {"size": 2, "select": [0, 1, 0, 1, 0, 1, 0]},
}


def check(folder, monkeypatch, changes):
    """Check a run on Lift, whose cameras, state and actions are not the folder's."""
    version_is(monkeypatch, "0.3.3")
    own = {"policy.checkpoint": str(folder), "env.cameras": ["agentview", "robot0_eye_in_hand"]}
    return check_start(load_config("lift", own | changes))


def test_a_mapping_gives_a_simulators_cameras_the_folders_names(folder):
    config = MappingConfig.model_validate({"obs": {"images": SEEN}})
    spec = EnvSpec(SHAPES | as_images(dict.fromkeys(["agentview", "robot0_eye_in_hand"], (3, 28, 28))), 2, 10)
    found = match(folder, cameras=NameMapping(config, spec).spec.shapes("images"))
    assert found == {"observation.images.top": "observation.images.top", "observation.images.wrist": "wrist"}


@pytest.mark.parametrize(
    ("key", "changed", "message"),
    [
        (
            "obs.images",
            None,
            r"missing: top, wrist; not .*: agentview, robot0_eye_in_hand; see env.cameras and policy.m",
        ),
        (
            "obs.images",
            SEEN | {"agentview_image": "front"},
            r"environment's: front, wrist; missing: top; not .*: front;",
        ),
        ("obs.state", None, r"state has 4 numbers, .* the shape \[19\]; see .* and policy.mapping.obs.state$"),
        ("action", {}, r"actions have 2 numbers, the environment's 7; see policy.mapping.action$"),
    ],
)
def test_what_a_mapping_leaves_unlike_the_folder_is_found_before_simulators_are_built(
    folder, monkeypatch, key, changed, message
):
    check(folder, monkeypatch, MAPPED)
    with pytest.raises(CheckpointError, match=message) as caught:
        check(folder, monkeypatch, MAPPED | {f"policy.mapping.{key}": changed})
    assert "\n" not in str(caught.value)


def version_is(monkeypatch, lerobot, transformers="4.53.3"):
    versions = {"lerobot": lerobot, "transformers": transformers}

    def find(name):
        if versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("asyncflow.config.lerobot_folder.importlib.metadata.version", find)


def test_without_lerobot_a_run_says_how_to_install_it_before_simulators_are_built(tmp_path, folder, monkeypatch):
    version_is(monkeypatch, None)
    monkeypatch.setattr("asyncflow.run.parts.make_vec_env", lambda *_: pytest.fail("simulators were built"))
    changes = TOY | {"policy.checkpoint": str(folder), "logging.out": str(tmp_path / "run")}
    message = r"needs the package lerobot 0.3, which is not installed: pip install 'asyncflow\[lerobot\]'$"
    with pytest.raises(ConfigError, match=message) as caught:
        train(load_config("toy_vla_tiny", changes), Silent())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_another_version_of_lerobot_is_refused(folder, monkeypatch):
    version_is(monkeypatch, "0.4.4")
    with pytest.raises(ConfigError, match=r"needs the package lerobot 0.3, 0.4.4 is installed"):
        open_lerobot(PolicyConfig(kind="lerobot", checkpoint=str(folder)))


@pytest.mark.parametrize(
    ("kind", "version", "message"),
    [
        (
            "pi0",
            "4.51.3",
            r"of type pi0 needs the package transformers 4.52 to 4.53, 4.51.3 is installed: pip install",
        ),
        ("smolvla", "4.49.0", r"of type smolvla needs the package transformers 4.50 to 4.53, 4.49.0 is installed"),
        ("smolvla", "5.0rc1", r"needs the package transformers 4.50 to 4.53, 5.0rc1 is installed"),
        ("pi0", None, r"of type pi0 needs the package transformers 4.52 to 4.53, which is not installed: pip install"),
    ],
)
def test_transformers_with_which_lerobots_code_of_a_type_does_not_run_is_refused(
    folder, monkeypatch, kind, version, message
):
    change(folder, type=kind, n_action_steps=50)
    config = PolicyConfig(kind="lerobot", checkpoint=str(folder))
    for other in ("4.52.4", "4.53.3"):
        version_is(monkeypatch, "0.3.3", other)
        assert open_lerobot(config).type == kind
    version_is(monkeypatch, "0.3.3", version)
    with pytest.raises(ConfigError, match=message):
        open_lerobot(config)


def test_the_kind_needs_a_folder():
    with pytest.raises(ConfigError, match=r"policy.kind = lerobot: needs policy.checkpoint"):
        open_lerobot(PolicyConfig(kind="lerobot"))


def test_a_folder_cannot_be_evaluated_by_itself(folder):
    with pytest.raises(CheckpointError, match="a LeRobot policy folder, which names no environment"):
        resolve_checkpoint(str(folder))


def test_a_policy_file_is_built_from_the_folder_beside_it(folder):
    config = PolicyConfig(kind="lerobot", checkpoint="elsewhere")
    assert with_export(config, folder.parent) == config
    folder.rename(folder.parent / "lerobot")
    assert with_export(config, folder.parent).checkpoint == str(folder.parent / "lerobot")
    assert with_export(PolicyConfig(checkpoint="elsewhere"), folder.parent).checkpoint == "elsewhere"


def statistics(*datasets):
    """Return a folder's tensors, of which each holds the name of its dataset."""
    modules = ("normalize_inputs", "normalize_targets", "unnormalize_outputs")
    prefixes = {f"{dataset}_" if dataset else "": dataset or "unnamed" for dataset in datasets}
    named = {f"{module}.{prefix}buffer_action.mean": name for prefix, name in prefixes.items() for module in modules}
    return named | {"model.a_buffer_b": "w"}


@pytest.mark.parametrize(
    ("datasets", "chosen", "taken"),
    [
        (("",), None, "unnamed"),
        (("so100",), None, "so100"),
        (("so100", "so100-red"), "so100-red", "so100-red"),
        (("so100", ""), "unnamed", "unnamed"),
    ],
)
def test_the_statistics_of_the_dataset_that_is_meant_are_taken_by_their_plain_name(datasets, chosen, taken):
    assert choose_statistics(statistics(*datasets), chosen, "it") == taken
    selected = select_statistics(statistics(*datasets), taken)
    assert selected.pop("model.a_buffer_b") == "w"
    assert selected == dict.fromkeys(statistics("").keys() - {"model.a_buffer_b"}, taken)


def test_without_statistics_nothing_is_left_out():
    assert select_statistics(statistics(), choose_statistics(statistics(), None, "it")) == statistics()


@pytest.mark.parametrize(
    ("datasets", "chosen", "message"),
    [
        (("so100-red", "so100", ""), None, "statistics of several datasets: so100, so100-red, unnamed; choose one"),
        (("so100",), "so101", "policy.statistics = so101: it without statistics of that name; allowed: so100"),
        ((), "so101", "allowed: none"),
    ],
)
def test_statistics_that_nobody_chose_are_refused_by_name(datasets, chosen, message):
    with pytest.raises(CheckpointError, match=message):
        choose_statistics(statistics(*datasets), chosen, "it")


def test_a_run_from_a_folder_for_several_datasets_is_refused_before_lerobot_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"lerobot": "0.3.3", "transformers": "4.53.3"}.get)
    header = json.dumps({name: {} for name in statistics("so100", "so101")}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="policy with the statistics of several datasets: so100, so101; choose"):
        open_lerobot(PolicyConfig(kind="lerobot", checkpoint=str(folder)))
    chosen = open_lerobot(PolicyConfig(kind="lerobot", checkpoint=str(folder), statistics="so101"))
    assert chosen.statistics == "so101"
