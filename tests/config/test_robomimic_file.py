"""Checkpoints of robomimic: what they hold arrives, and what is hostile or broken in one is refused and never run."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.core import multiarray
from robomimic_wrapper import register_mujoco_py

from asyncflow.config import robomimic_file
from asyncflow.config.robomimic_file import load_restricted, load_robomimic_file
from asyncflow.errors import CheckpointError
from asyncflow.simulators.robosuite.simulator import quiet

META = {"env_name": "Lift", "type": 1, "env_version": "1.5.2", "env_kwargs": {"robots": ["Panda"], "control_freq": 20}}
FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


class Hostile:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def checkpoint(**changes: Any) -> dict[str, Any]:
    """Return what robomimic saves."""
    stats = {"object": {"mean": np.arange(10.0).reshape(1, 10), "std": np.ones((1, 10), np.float32)}}
    content = {
        "model": torch.nn.Sequential(torch.nn.Linear(3, 2)).state_dict(),
        "config": json.dumps({"algo_name": "bc"}),
        "algo_name": "bc",
        "env_metadata": META,
        "shape_metadata": {"ac_dim": 7, "all_shapes": OrderedDict(object=[10]), "use_images": False},
        "obs_normalization_stats": stats,
    }
    return content | changes


def save(path: Path, content: Any, is_zip: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_robomimic_file(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value).removeprefix(f"{path}: ")


def rewrite_zip(source: Path, target: Path, compression: int = zipfile.ZIP_STORED, **replaced: bytes) -> Path:
    """Copy a zip file; `replaced` maps the stems of records to other content."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, replaced.get(Path(name).stem, old.read(name)))
    return target


@FORMATS
def test_algorithm_and_environment_arrive(tmp_path, is_zip):
    file = load_robomimic_file(save(tmp_path / "model.pth", checkpoint(), is_zip))
    assert (file.algo_name, file.env_meta) == ("bc", META)


@FORMATS
def test_tensors_and_containers_arrive(tmp_path, is_zip):
    content = {"a": torch.arange(3), "b": torch.ones(2, dtype=torch.bfloat16), "c": [1, (2.5, None)], "d": {"x", "y"}}
    loaded = load_restricted(save(tmp_path / "model.pth", content | {"e": OrderedDict(f=b"bytes")}, is_zip))
    assert all(torch.equal(loaded[key], content[key]) for key in "ab")
    assert [loaded[key] for key in "cde"] == [content["c"], content["d"], OrderedDict(f=b"bytes")]


@FORMATS
@pytest.mark.parametrize(
    "array",
    [
        np.linspace(0, 1, 6).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.array(3.5),
        np.array([True, False]), np.array(["a", "bc"]), np.zeros((0, 3)), np.arange(3, dtype=">f4"), np.float32(0.1),
        np.int64(-3), np.bool_(True),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)  # fmt: skip
def test_arrays_and_scalars_of_numpy_arrive(tmp_path, array, is_zip):
    loaded = load_restricted(save(tmp_path / "model.pth", [array, array], is_zip))
    assert all(isinstance(each, np.ndarray if array.shape else (np.ndarray, np.generic)) for each in loaded)
    assert loaded[0].dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(np.stack(loaded), np.stack([array, array]))


@pytest.mark.parametrize(
    ("own", "other"),
    [(b"numpy.core.multiarray", b"numpy._core.multiarray"), (b"numpy._core.multiarray", b"numpy.core.multiarray")],
)
def test_arrays_of_either_numpy_arrive(tmp_path, own, other):
    source = save(tmp_path / "model.pth", checkpoint())
    with zipfile.ZipFile(source) as archive:
        data = archive.read("model/data.pkl").replace(own, other)
    path = rewrite_zip(source, tmp_path / "other.pth", data=data)
    np.testing.assert_array_equal(load_restricted(path)["obs_normalization_stats"]["object"]["std"], np.ones((1, 10)))


def test_numbers_of_numpy_in_the_description_become_plain(tmp_path):
    meta = META | {"env_kwargs": {"freq": np.int64(20), "limits": np.array([-1.0, 1.0])}}
    loaded = load_robomimic_file(save(tmp_path / "model.pth", checkpoint(env_metadata=meta))).env_meta
    assert json.dumps(loaded["env_kwargs"]) == '{"freq": 20, "limits": [-1.0, 1.0]}'


@FORMATS
def test_a_function_is_named_and_never_called(tmp_path, is_zip):
    mark = tmp_path / "mark"
    assert "posix.system" in refusal(save(tmp_path / "model.pth", checkpoint(model=Hostile(mark)), is_zip))
    assert not mark.exists()


@FORMATS
def test_a_function_is_found_however_deep_it_lies(tmp_path, is_zip):
    config = {"train": [{"data": ({"path": Hostile(tmp_path / "mark")},)}]}
    assert "posix.system" in refusal(save(tmp_path / "model.pth", checkpoint(config=config), is_zip))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_plain_pickle_of_any_protocol_is_refused(tmp_path, protocol):
    path = tmp_path / "model.pth"
    path.write_bytes(pickle.dumps(Hostile(tmp_path / "mark"), protocol))
    assert "posix.system" in refusal(path)
    assert not (tmp_path / "mark").exists()


def test_torch_itself_refuses_what_the_list_would_let_through(tmp_path, monkeypatch):
    monkeypatch.setattr(robomimic_file, "ALLOWED", robomimic_file.ALLOWED | {"posix.system"})
    assert "damaged" in refusal(save(tmp_path / "model.pth", checkpoint(model=Hostile(tmp_path / "mark"))))
    assert not (tmp_path / "mark").exists()


def test_all_refused_names_are_listed_at_once(tmp_path):
    content = checkpoint(model=Hostile(tmp_path / "mark"), config=Path("x"), shape_metadata=torch.device("cpu"))
    message = refusal(save(tmp_path / "model.pth", content))
    assert all(name in message for name in ("posix.system", "pathlib.PosixPath", "torch.device"))


def test_a_name_full_of_control_characters_is_shown_without_them(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"\x80\x02c\x1b[2Jos\nsystem\n.")
    assert r"\x1b[2Jos.system" in refusal(path)


@FORMATS
@pytest.mark.parametrize(
    "array",
    [np.array([{}], dtype=object), np.zeros(2, dtype=[("a", "O"), ("b", "f8")]), np.array(["2026-01-01"], "M8[D]")],
    ids=["objects", "records", "dates"],
)
def test_only_arrays_of_numbers_and_text_are_read(tmp_path, array, is_zip):
    assert "refused a numpy array of dtype" in refusal(save(tmp_path / "model.pth", checkpoint(config=array), is_zip))


@FORMATS
@pytest.mark.parametrize("keep", [1, 2, 10, 100, 700, -300, -1])
def test_a_truncated_file_is_refused(tmp_path, is_zip, keep):
    path = save(tmp_path / "model.pth", checkpoint(), is_zip)
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged" in refusal(path)


@pytest.mark.parametrize(
    "start", [b"", b"PK\x03\x04", b"\x80\x02", b"ustar", b"\x89HDF\r\n", b"\x80\x02X\xff\xff\xff\xff"]
)
def test_random_bytes_are_refused(tmp_path, start):
    path = tmp_path / "model.pth"
    for seed in range(20):
        path.write_bytes(start + np.random.default_rng(seed).bytes(50 * seed))
        assert "\n" not in refusal(path)


@FORMATS
def test_a_flipped_byte_is_a_refusal_at_worst(tmp_path, is_zip):
    path = save(tmp_path / "model.pth", checkpoint(), is_zip)
    whole = path.read_bytes()
    for position in range(0, len(whole), 97):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        with contextlib.suppress(CheckpointError):
            load_robomimic_file(path)


def test_a_missing_file_is_refused(tmp_path):
    assert refusal(tmp_path / "model.pth") == "cannot read it: No such file or directory"


def test_compressed_records_are_refused_before_they_are_unpacked(tmp_path):
    source = save(tmp_path / "model.pth", checkpoint(model=torch.zeros(1_000_000)))
    path = rewrite_zip(source, tmp_path / "bomb.pth", zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    assert "compressed or overlapping" in refusal(path)


def test_containers_that_repeat_each_other_are_refused(tmp_path):
    value: Any = ["lift"] * 10
    for _ in range(30):
        value = [value] * 10
    assert "huge" in refusal(save(tmp_path / "model.pth", checkpoint(env_metadata={"env_name": value})))


def test_a_description_within_itself_is_refused(tmp_path):
    meta: dict[str, Any] = {}
    meta["env_kwargs"] = meta
    assert "env_metadata" in refusal(save(tmp_path / "model.pth", checkpoint(env_metadata=meta)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "no algo_name and no env_metadata"),
        (torch.nn.Linear(1, 1).state_dict(), "no algo_name and no env_metadata"),
        ({"algo_name": "bc"}, "it has no env_metadata"),
        (checkpoint(algo_name=3), "algo_name must be text"),
        (checkpoint(env_metadata=[1]), "env_metadata a mapping"),
        (checkpoint(env_metadata={"x": torch.zeros(1)}), "plain values"),
    ],
    ids=["list", "weights", "half", "algo_name", "env_metadata", "tensor"],
)
def test_another_content_is_not_robomimics(tmp_path, content, reason):
    assert reason in refusal(save(tmp_path / "model.pth", content))


class Call:
    """Its pickle calls a function, and gives the result a state."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.content = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.content


def array(shape: tuple[int, ...], dtype: str, data: bytes) -> Call:
    return Call(multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, shape, np.dtype(dtype), False, data))


def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Call:
    arguments = (torch.arange(8.0)._typed_storage(), offset, size, stride, False, OrderedDict())
    return Call(torch._utils._rebuild_tensor_v2, *arguments)


def nested(depth: int) -> Any:
    """Return a tuple whose hash takes 2 ** depth steps; in a pickle it is small."""
    value: Any = ()
    for _ in range(depth):
        value = (value, value)
    return value


BYTES, PAIRS, NUMBERS = b"x" * 3000, [(i, 0) for i in range(999)], list(range(999))
LIES = {
    "array of a huge dtype": array((), "U999999999", b""),
    "array of huge text": array((1,), "U90000", b""),
    "array without its data": array((10**9,), "f8", b""),
    "array of many empty ones": array((10**9, 0), "f8", b""),
    "array of a product beyond 64 bits": array((2**33, 2**33), "f8", b""),
    "number of a huge dtype": Call(multiarray.scalar, np.dtype("S900000000"), b"1"),
    "number without its data": Call(multiarray.scalar, np.dtype("f8"), b""),
    "one text as many arrays": [array((3000,), "u1", BYTES) for _ in range(99)],
    "one list as many mappings": [Call(OrderedDict, PAIRS) for _ in range(99)],
    "one list as many sets": [Call(set, NUMBERS) for _ in range(999)],
    "expanded tensor": tensor((10**9,), (0,)),
    "tensor beyond its storage": tensor((8,), (1,), offset=1),
    "tensor of large steps": tensor((2,), (10**15,)),
    "key that takes years to hash": Call(OrderedDict, [(nested(60), 0)]),
    "member that takes years to hash": Call(set, [nested(60)]),
    "integers of one hash": {1 + 5 * (2**61 - 1): 0},
}


@FORMATS
@pytest.mark.parametrize("name", LIES)
def test_a_size_that_the_file_only_claims_is_refused_before_anything_is_allocated(tmp_path, name, is_zip):
    path = save(tmp_path / "model.pth", checkpoint(config=LIES[name]), is_zip)
    assert refusal(path).startswith("refused")


def test_a_storage_longer_than_its_record_is_refused(tmp_path):
    source = save(tmp_path / "model.pth", checkpoint(config=torch.zeros(200)))
    with zipfile.ZipFile(source) as archive:
        data = archive.read("model/data.pkl").replace(b"K\xc8", b"J\x00\x00\x00\x7f")
    assert refusal(rewrite_zip(source, tmp_path / "other.pth", data=data)).startswith(
        "refused: a storage of 2130706432"
    )


def test_a_storage_longer_than_a_legacy_file_is_refused(tmp_path):
    path = save(tmp_path / "model.pth", checkpoint(config=torch.zeros(200)), is_zip=False)
    path.write_bytes(path.read_bytes().replace(b"K\xc8", b"J\x00\x00\x00\x7f"))
    assert refusal(path).startswith("refused: a storage of 2130706432")


def test_a_description_nested_without_end_is_refused(tmp_path):
    meta: Any = "Lift"
    for _ in range(200):
        meta = {"env_name": meta}
    assert "deeply nested" in refusal(save(tmp_path / "model.pth", checkpoint(env_metadata=meta)))


def test_a_scripted_module_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": b"\x80\x02}.", "constants.pkl": b"\x80\x02).", "version": b"3"}.items():
            archive.writestr(f"model/{name}", data)
    assert "damaged" in refusal(path)


@FORMATS
def test_a_checkpoint_written_by_robomimic_itself_is_read(tmp_path, is_zip, monkeypatch):
    if not is_zip:
        monkeypatch.setattr(torch, "save", partial(torch.save, _use_new_zipfile_serialization=False))
    _write_by_robomimic(tmp_path / "model.pth")
    file = load_robomimic_file(tmp_path / "model.pth")
    assert (file.algo_name, file.env_meta) == ("bc", META)
    weights = load_restricted(tmp_path / "model.pth")["model"]
    assert weights["policy.nets.mlp._model.0.weight"].shape == (8, 13)


def _write_by_robomimic(path: Path) -> None:
    """Save a behaviour cloning policy as robomimic's own training does."""
    register_mujoco_py()
    with quiet():
        from robomimic.algo import algo_factory  # noqa: PLC0415  seconds
        from robomimic.config import config_factory  # noqa: PLC0415
        from robomimic.utils import obs_utils, train_utils  # noqa: PLC0415

        config = config_factory("bc")
        with config.values_unlocked():
            config.observation.modalities.obs.low_dim = ["object", "robot0_eef_pos"]
            config.algo.actor_layer_dims = [8, 8]
            config.train.hdf5_normalize_obs = True
        obs_utils.initialize_obs_utils_with_config(config)
        shapes = OrderedDict(object=[10], robot0_eef_pos=[3])
        model = algo_factory("bc", config, shapes, ac_dim=7, device=torch.device("cpu"))
        stats = {key: {"mean": np.zeros((1, *size)), "std": np.ones((1, *size))} for key, size in shapes.items()}
        shape_meta = {"ac_dim": 7, "all_shapes": shapes, "all_obs_keys": list(shapes), "use_images": False}
        train_utils.save_model(model, config, META, shape_meta, str(path), stats)
