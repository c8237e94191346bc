import json
import math
import os
import struct
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from asyncflow.checksums import describe_folder
from asyncflow.config.observations import Field
from asyncflow.config.sections import PolicyConfig
from asyncflow.errors import CheckpointError, ContractError
from asyncflow.policies import Policy, make_policy, policy_file
from asyncflow.policies.policy_file import (
    check_finite,
    load_into,
    load_policy_file,
    resolve_checkpoint,
    save_policy,
    shipped_weights,
)
from asyncflow.simulators.spec import EnvSpec

META = {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": ["Panda"]}}
SPEC = EnvSpec({"state": (4,)}, 2, 40, env_meta=META, obs_keys=("object",))
CONFIG = PolicyConfig(hidden_sizes=[8], critic_hidden_sizes=[8])


def make(config: PolicyConfig = CONFIG, seed: int = 0) -> Policy:
    return make_policy(config, SPEC, seed)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "policy.safetensors"
    save_policy(path, make(), CONFIG, SPEC)
    return path


def test_file_gives_back_what_was_saved(saved):
    file = load_policy_file(saved)
    assert (file.policy_config, file.env_spec) == (CONFIG, SPEC)
    expected = make().state_dict()
    assert file.tensors.keys() == expected.keys()
    assert all(torch.equal(file.tensors[name], tensor) for name, tensor in expected.items())


def test_limits_of_actions_are_kept_and_older_files_hold_one_number(tmp_path):
    spec = replace(SPEC, action_low=(-math.inf, 0.0), action_high=(math.inf, 300.0))
    save_policy(tmp_path / "new.safetensors", make(), CONFIG, spec)
    assert load_policy_file(tmp_path / "new.safetensors").env_spec == spec
    for limit, expected in ((1.0, SPEC), (0.5, replace(SPEC, action_low=(-0.5, -0.5), action_high=(0.5, 0.5)))):
        env = {key: value for key, value in asdict(SPEC).items() if key not in ("action_low", "action_high")}
        header = {"version": 1, "policy": CONFIG.model_dump(), "env": env | {"action_limit": limit}}
        save_file(make().state_dict(), tmp_path / "old", metadata={"asyncflow-policy": json.dumps(header)})
        assert load_policy_file(tmp_path / "old").env_spec == expected


@pytest.mark.parametrize(("low", "high"), [((0.0,), (1.0,)), ((2.0, 0.0), (1.0, 1.0))])
def test_limits_that_do_not_fit_the_action_are_refused(low, high):
    with pytest.raises(ContractError, match="action_low"):
        replace(SPEC, action_low=low, action_high=high)


def test_loading_makes_another_policy_decide_alike(saved):
    policy, other = make(), make(seed=1)
    load_into(other, load_policy_file(saved))
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))


def test_same_policy_gives_same_bytes(saved, tmp_path):
    save_policy(tmp_path / "again.safetensors", make(), CONFIG, SPEC)
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_interrupted_write_leaves_the_old_file_and_no_other(saved, monkeypatch):
    old = saved.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_policy(saved, make(seed=1), CONFIG, SPEC)
    assert saved.read_bytes() == old
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_bytes_are_flushed_before_the_name_changes(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *_: calls.append("replace"))
    save_policy(tmp_path / "policy.safetensors", make(), CONFIG, SPEC)
    assert calls == ["fsync", "replace", "fsync"]


def test_mismatch_names_tensor_and_both_shapes(saved):
    wider = make(CONFIG.model_copy(update={"critic_hidden_sizes": [16]}))
    with pytest.raises(CheckpointError, match=r"critic\.0\.bias \[16\] vs \[8\]"):
        load_into(wider, load_policy_file(saved))


def test_mismatch_changes_no_parameter(saved):
    wider = make(CONFIG.model_copy(update={"critic_hidden_sizes": [16]}), seed=1)
    before = {name: tensor.clone() for name, tensor in wider.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_into(wider, load_policy_file(saved))
    assert all(torch.equal(before[name], tensor) for name, tensor in wider.state_dict().items())


@pytest.mark.parametrize("method", ["flow_sde", "flow_cps"])
def test_weights_serve_every_noise_method(saved, method):
    config = CONFIG.model_copy(update={"noise_method": method, "learn_noise": False, "noise_level": 0.25})
    policy = make(config, seed=1)
    load_into(policy, load_policy_file(saved))
    assert policy.state_dict()["sampler.noise_level"] == 0.25


@pytest.mark.parametrize("keep", [0, 4, 100, -20])
def test_truncated_file_is_refused_in_one_line(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated") as error:
        load_policy_file(saved)
    assert "\n" not in str(error.value)


def test_garbage_is_refused(tmp_path):
    path = tmp_path / "policy.safetensors"
    path.write_bytes(b"\x80\x02garbage that a pickle might start with")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_policy_file(path)


def test_foreign_safetensors_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="without asyncflow's metadata"):
        load_policy_file(path)


def test_newer_format_is_refused(tmp_path):
    path = tmp_path / "policy.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata={policy_file.FORMAT: json.dumps({"version": 99})})
    with pytest.raises(CheckpointError, match="format version 99"):
        load_policy_file(path)


def test_checkpoint_may_be_named_by_file_folder_or_run(tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "update_000010"
    save_policy(folder / "policy.safetensors", make(), CONFIG, SPEC)
    (folder.parent / "last").symlink_to(folder.name)
    names = [folder / "policy.safetensors", folder, tmp_path / "run"]
    found = {resolve_checkpoint(str(name)).resolve() for name in names}
    assert found == {(folder / "policy.safetensors").resolve()}


def test_shipped_weights_are_found_by_name():
    path = resolve_checkpoint("lift_flow")
    assert load_policy_file(path).env_spec.env_meta["env_name"] == "Lift"


def test_shipped_weights_fit_the_default_policy():
    file = load_policy_file(resolve_checkpoint("lift_flow"))
    load_into(make_policy(PolicyConfig(), file.env_spec, seed=0), file)


def test_shipped_weights_are_small():
    assert all(resolve_checkpoint(name).stat().st_size < 1_000_000 for name in shipped_weights())


def test_missing_checkpoint_names_the_shipped_weights():
    with pytest.raises(CheckpointError, match=r"checkpoint lift_flaw: not found.*lift_flow"):
        resolve_checkpoint("lift_flaw")


def refusal_of(path):
    with pytest.raises(CheckpointError) as error:
        load_policy_file(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_policy_of_robomimic_is_described_with_what_can_be_taken_from_it(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": {}, "algo_name": "bc", "env_metadata": SPEC.env_meta}, path)
    message = refusal_of(path)
    assert "algorithm 'bc', environment 'Lift'" in message
    assert message.endswith(f"env.env_meta={path}")


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model.safetensors", "model"])
def test_a_hostile_pickle_is_refused_without_running_it(tmp_path, name):
    path, mark = tmp_path / name, tmp_path / "mark"
    path.write_bytes(f"cos\nsystem\n(Vtouch {mark}\ntR.".encode())
    assert ("os.system" if path.suffix in (".pth", ".pt") else "not a safetensors file") in refusal_of(path)
    assert not mark.exists()


def test_a_policy_file_may_have_any_suffix(saved):
    path = saved.rename(saved.with_suffix(".pth"))
    assert load_policy_file(path).env_spec == SPEC


@pytest.mark.parametrize(
    "header", ["[" * 100_000, '{"__metadata__": 3}', '{"__metadata__": ["asyncflow-policy"]}', "[]"]
)
def test_a_header_of_another_shape_is_refused(tmp_path, header):
    path = tmp_path / "policy.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    assert "safetensors" in refusal_of(path)


def change_header(path, change):
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[policy_file.FORMAT])
    header["env"] = change(header["env"])
    save_file(load_file(path), path, {policy_file.FORMAT: json.dumps(header)})


@pytest.mark.parametrize("settings", ["abc", 3, ["num_points"]])
def test_a_header_whose_settings_of_what_is_rendered_are_no_keys_is_refused(saved, settings):
    change_header(saved, lambda env: env | {"rendered_with": settings})
    assert "written by another version of asyncflow: env.rendered_with = " in refusal_of(saved)


@pytest.mark.parametrize("settings", [{"num_points": "many"}, {"num_steps_wait": -1}, {"rotate_images": 3}])
def test_a_header_whose_settings_env_would_not_take_is_refused(saved, settings):
    change_header(saved, lambda env: env | {"rendered_with": settings})
    assert f"env.{next(iter(settings))} = " in refusal_of(saved)


def test_a_file_of_0_1_0_describes_the_same_environment_in_its_own_words(saved):
    settings = {"num_points": 64, "point_bounds": [-1.0, -1.0, 0.0, 1.0, 1.0, 1.0], "camera_size": [28, 28]}
    old = {
        "obs_shapes": {"state": [2, 4], "points.top": [2, 64, 6]},
        "image_shapes": {"front": [2, 3, 28, 28]},
        "point_settings": settings,
    }
    kept = ("action_dim", "horizon", "env_meta", "obs_keys", "obs_widths", "task", "action_low", "action_high")
    change_header(saved, lambda env: old | {key: env[key] for key in kept})
    shapes = {"state": (2, 4), "images.front": (2, 3, 28, 28), "points.top": (2, 64, 6)}
    expected = EnvSpec(shapes, 2, 40, env_meta=META, obs_keys=("object",), rendered_with=settings)
    assert load_policy_file(saved).env_spec == expected
    assert expected.obs["images.front"] == Field("images", (2, 3, 28, 28), "uint8")


def test_a_file_carries_the_cameras_it_was_made_for(tmp_path):
    spec = EnvSpec({"state": (4,), "images.front": (3, 28, 28)}, 2, 40, task="ToyImages")
    save_policy(
        tmp_path / "policy.safetensors",
        make_policy(PolicyConfig(), EnvSpec({"state": (4,)}, 2, 10), 0),
        PolicyConfig(),
        spec,
    )
    assert load_policy_file(tmp_path / "policy.safetensors").env_spec == spec


def rewrite(path, change):
    """Write a policy file again with changed tensors."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(path)), path, metadata)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(saved, number):
    def spoil(tensors):
        tensors["critic.0.bias"][3] = number
        return tensors

    rewrite(saved, spoil)
    assert refusal_of(saved) == f"{saved}: holds NaN or inf in critic.0.bias"


def test_an_attention_mask_may_hold_minus_infinity():
    check_finite({"mask": torch.full((2, 2), -math.inf).triu(1)}, "file")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.int64])
def test_weights_of_another_kind_are_refused_instead_of_cast(saved, dtype):
    rewrite(saved, lambda tensors: tensors | {"critic.0.weight": tensors["critic.0.weight"].to(dtype)})
    with pytest.raises(CheckpointError, match=rf"critic\.0\.weight torch\.float32 vs {dtype}"):
        load_into(make(), load_policy_file(saved))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_converted(saved, dtype):
    rewrite(saved, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    policy = make(seed=1)
    load_into(policy, load_policy_file(saved))
    assert torch.equal(policy.critic[0].weight, make().critic[0].weight.to(dtype).float())


def test_weights_that_overflow_when_they_are_converted_are_refused(saved):
    rewrite(saved, lambda tensors: tensors | {"critic.0.weight": torch.full((8, 4), 1e300, dtype=torch.float64)})
    with pytest.raises(CheckpointError, match=r"holds NaN or inf in critic\.0\.weight"):
        load_into(make(), load_policy_file(saved))


@pytest.fixture
def in_checkpoint(saved):
    """A policy file in a checkpoint's folder, with an exported one."""
    (saved.parent / "exported").mkdir()
    (saved.parent / "exported" / "model.bin").write_bytes(b"whole")
    (saved.parent / "training.safetensors").write_bytes(b"not read by an evaluation")
    (saved.parent / "checksums.json").write_bytes(describe_folder(saved.parent))
    return saved


def test_a_policy_file_of_a_checkpoint_is_checked_by_whatever_name_it_is_reached(in_checkpoint, tmp_path):
    load_policy_file(in_checkpoint)
    content = bytearray(in_checkpoint.read_bytes())
    content[-400:] = bytes(byte ^ 1 for byte in content[-400:])
    in_checkpoint.write_bytes(content)
    (tmp_path / "link").symlink_to(in_checkpoint)
    for path in (in_checkpoint, tmp_path / "link"):
        assert refusal_of(path) == f"{in_checkpoint}: damaged: its checksum differs"


def test_what_lies_beside_a_policy_file_in_folders_is_checked_and_nothing_else(in_checkpoint):
    (in_checkpoint.parent / "training.safetensors").write_bytes(b"")
    load_policy_file(in_checkpoint)
    (in_checkpoint.parent / "exported" / "model.bin").write_bytes(b"torn")
    assert "exported/model.bin: damaged" in refusal_of(in_checkpoint)
    (in_checkpoint.parent / "exported" / "model.bin").unlink()
    assert "exported/model.bin: missing" in refusal_of(in_checkpoint)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"policy.safetensors": 3}', '{"../x": ""}', '{"/dev/zero": ""}', "[" * 9999, '{"a\\u0000/b": ""}'],
)
def test_damaged_checksums_are_told(in_checkpoint, content):
    (in_checkpoint.parent / "checksums.json").write_text(content)
    assert str(in_checkpoint.parent) in refusal_of(in_checkpoint)


def vector(shape):
    return {"kind": "vector", "shape": shape}


def picture(shape):
    return {"images.top": {"kind": "images", "shape": shape, "dtype": "uint8"}}


ENV_LIES = {
    "horizon of zero": ({"horizon": 0}, "env.spec.horizon has 0"),
    "horizon of text": ({"horizon": "x"}, "env.horizon = 'x'"),
    "endless horizon": ({"horizon": 2**70}, "env.horizon = "),
    "no actions": ({"action_dim": 0}, "env.spec.action_dim has 0"),
    "negative actions": ({"action_dim": -2}, "env.spec.action_dim has -2"),
    "huge actions": ({"action_dim": 10**12}, "a size of 1000000000000"),
    "huge actions of an old file": ({"action_dim": 10**12, "action_limit": 2.0}, "a size of 1000000000000"),
    "limit of text": ({"action_limit": "wide"}, "'wide'"),
    "limits of NaN": ({"action_low": [math.nan] * 2, "action_high": [1.0] * 2}, "must not exceed"),
    "negative sizes": ({"obs": {"state": vector([-4])}}, "env.spec.obs['state'] has -4"),
    "sizes of text": ({"obs": {"state": vector(["4"])}}, "env.obs.state.shape[0] = '4'"),
    "no state": ({"obs": {"pose": vector([4])}}, "env.spec.obs is a dict of ['pose']"),
    "fields that are a list": ({"obs": [4]}, "env.obs = [4]"),
    "shapes of an old file that are a list": ({"obs": None, "obs_shapes": [4]}, "env.obs_shapes = [4]"),
    "pictures without colours": (
        {"obs": {"state": vector([4])} | picture([28, 28])},
        "env.spec.obs has for images.top",
    ),
    "pictures of terabytes": ({"obs": {"state": vector([4])} | picture([3, 2**40, 2**40])}, "a size of 1099511627776"),
    "a field of no kind": ({"obs": {"state": {"kind": "smell", "shape": [4]}}}, "has for state the kind 'smell'"),
    "numbers of eight bits": ({"obs": {"state": vector([4]) | {"dtype": "uint8"}}}, "has for state the dtype 'uint8'"),
    "widths that do not add up": ({"obs_widths": [3]}, "env.obs_widths = [3]"),
    "widths of other keys": ({"obs_widths": [2, 2]}, "env.obs_widths = [2, 2]"),
    "keys of numbers": ({"obs_keys": [1]}, "env.obs_keys[0] = 1"),
    "a description of text": ({"env_meta": "Lift"}, "env.env_meta = 'Lift'"),
    "settings of something else": ({"rendered_with": {"task": "Toy"}}, "env.rendered_with: unknown key 'task'"),
    "an unknown key": ({"colour": 1}, "env: unknown key 'colour'"),
}
POLICY_LIES = {
    "more executed than predicted": ({"n_action_steps": 10**9}, "policy.n_action_steps = 1000000000 must be at most"),
    "negative widths": ({"hidden_sizes": [-8]}, "policy.hidden_sizes[0] = -8"),
    "widths of text": ({"hidden_sizes": "wide"}, "policy.hidden_sizes = 'wide'"),
    "endless denoising": ({"num_inference_steps": 10**9}, "policy.num_inference_steps = 1000000000"),
    "noise that is none": ({"noise_range": [-1.0, 0.5]}, "policy.noise_range"),
    "an unknown kind": ({"kind": "oracle"}, "policy.kind = 'oracle'"),
    "an unknown key": ({"colour": 1}, "unknown key policy.colour"),
}


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [("env", *lie) for lie in ENV_LIES.values()] + [("policy", *lie) for lie in POLICY_LIES.values()],
    ids=[*ENV_LIES, *POLICY_LIES],
)
def test_a_file_that_lies_about_itself_is_refused_with_what_it_says(saved, part, change, said):
    assert said in refusal_of(describe_as(saved, lambda header: header | {part: header[part] | change}))


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "change",
    [{"env": None}, {"env": []}, {"policy": None}, {"policy": 3}, {"env": {}}, {"env": nested(500)}],
    ids=range(6),
)
def test_a_file_without_a_description_is_refused(saved, change):
    refusal_of(describe_as(saved, lambda header: header | change))


def describe_as(path, change):
    """Write a policy file again with another description."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[policy_file.FORMAT])
    save_file(load_file(path), path, {policy_file.FORMAT: json.dumps(change(header))})
    return path
