"""Which device a run uses: the names in the configuration, checked against what this machine has."""

from __future__ import annotations

import re

import torch

from asyncflow.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` takes CUDA where there is any, and CUDA devices carry their index.

    Raises:
        ConfigError: The name is none, or this machine has no such device.
    """
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", 0) if num_cuda else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise ConfigError(f"trainer.device = {name!r}: expected auto, cpu, cuda or cuda:N")
    index = int(match[1] or 0)
    if index >= num_cuda:
        raise ConfigError(f"trainer.device = {name!r}: no such device here; available: {_available(num_cuda)}")
    return torch.device("cuda", index)


def check_compile(mode: str, device: torch.device) -> None:
    """Refuse a CUDA graph of what does not run on CUDA.

    Raises:
        ConfigError: The device cannot do it.
    """
    if mode == "graph" and device.type != "cuda":
        raise ConfigError(
            f"policy.compile = {mode!r}: needs a CUDA device, trainer.device is {device} here; allowed: none, compile"
        )


def _available(num_cuda: int) -> str:
    return ", ".join(["auto", "cpu", *(f"cuda:{index}" for index in range(num_cuda))])
