"""Which demonstrations of a dataset are used."""

import h5py
import numpy as np
import pytest

from asyncflow.demos.choice import choose_demonstrations, find_failures
from asyncflow.errors import ConfigError

NAMES = [f"demo_{number}" for number in range(12)]


@pytest.fixture
def file(tmp_path):
    with h5py.File(tmp_path / "demos.hdf5", "w") as file:
        for name in NAMES:
            file.create_group(f"data/{name}")
        yield file


def mask(file, **keys):
    for key, numbers in keys.items():
        file[f"mask/{key}"] = np.array([f"demo_{number}" for number in numbers], dtype="S8")


def test_without_masks_all_are_used_in_numerical_order(file):
    assert choose_demonstrations(file, None, "it") == (NAMES, "all")


def test_demonstrations_kept_for_training_are_used(file):
    mask(file, train=[10, 2, 1], valid=[3])
    assert choose_demonstrations(file, None, "it") == (["demo_1", "demo_2", "demo_10"], "mask/train")


def test_demonstrations_kept_for_validation_are_left_out(file):
    mask(file, valid=range(1, 12))
    assert choose_demonstrations(file, None, "it") == (["demo_0"], "all but mask/valid")


@pytest.mark.parametrize(
    ("key", "chosen", "meaning"),
    [("20_percent", NAMES[4:5], "mask/20_percent"), ("valid", NAMES[3:4], "mask/valid"), ("all", NAMES, "all")],
)
def test_a_filter_key_wins(file, key, chosen, meaning):
    mask(file, train=[1], valid=[3], **{"20_percent": [4]})
    assert choose_demonstrations(file, key, "it") == (chosen, meaning)


@pytest.mark.parametrize(
    ("masks", "key", "message"),
    [
        ({}, "train", "--filter-key train: it has no mask/train; allowed: all"),
        ({"valid": [1], "train": [2]}, "20_percent", "--filter-key 20_percent: .* allowed: train, valid, all"),
        ({"train": [99]}, None, "it: /mask/train names 'demo_99', which is not under `data`"),
        ({"train": []}, None, "it: mask/train is no demonstration; use another --filter-key, such as all"),
        ({"valid": range(12)}, None, "it: all but mask/valid is no demonstration"),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_a_line(file, masks, key, message):
    mask(file, **masks)
    with pytest.raises(ConfigError, match=message):
        choose_demonstrations(file, key, "it")


@pytest.mark.parametrize(
    ("env_name", "kwargs", "failures"),
    [
        ("Lift", {}, [0]),
        ("Lift", {"reward_shaping": True}, [0, 1]),
        ("Lift", {"reward_shaping": True, "reward_scale": 0.5}, [0]),
        ("NutAssembly", {}, [0, 1]),
        ("Wipe", {}, None),
    ],
)
def test_a_success_is_what_the_environment_pays_in_full(file, env_name, kwargs, failures):
    groups = [file["data"][name] for name in NAMES[:3]]
    for group, best in zip(groups, (0.0, 0.6, 1.0), strict=True):
        group["rewards"] = np.array([0.0, best], dtype=np.float32)
    assert find_failures(groups, {"env_name": env_name, "env_kwargs": kwargs}) == failures


def test_without_rewards_nobody_knows(file):
    assert find_failures([file["data/demo_0"]], {"env_name": "Lift", "env_kwargs": {}}) is None
