"""The device that a name means, on machines with and without CUDA."""

from __future__ import annotations

import pytest
import torch

from asyncflow.devices import resolve_device
from asyncflow.errors import ConfigError


@pytest.fixture(params=[0, 2])
def num_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Pretend that the machine has this many CUDA devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return int(request.param)


def test_auto_takes_cuda_where_there_is_any(num_cuda: int) -> None:
    assert resolve_device("auto") == torch.device("cuda:0" if num_cuda else "cpu")


def test_cpu_is_always_there(num_cuda: int) -> None:
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1", "cuda:2"])
def test_a_cuda_device_is_found_or_refused_with_what_there_is(num_cuda: int, name: str) -> None:
    index = int(name.partition(":")[2] or 0)
    if index < num_cuda:
        assert resolve_device(name) == torch.device("cuda", index)
        return
    with pytest.raises(ConfigError, match=r"available: auto, cpu(, cuda:0, cuda:1)?$"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:x", "cpu:1", "", "cuda:-1"])
def test_what_is_no_device_is_refused(num_cuda: int, name: str) -> None:
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda or cuda:N"):
        resolve_device(name)
