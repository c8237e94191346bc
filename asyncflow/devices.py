"""Devices: which one a run uses, and how much memory is free there before much of it is allocated.

Where neither the operating system nor CUDA says how much is free, nothing is checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from asyncflow.errors import ConfigError

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")

# Files of a control group: limit, usage, and the field of memory.stat with what of the usage is cache to be dropped.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")


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


def check_memory(num_bytes: int, device: torch.device, keys: str) -> None:
    """Refuse what does not fit into the memory that is free.

    Args:
        num_bytes: What is about to be allocated.
        device: Where.
        keys: The keys of the configuration that lead to less, as they are to be read in the message.

    Raises:
        ConfigError: It does not fit.
    """
    _check(f"device {device}", num_bytes, free_memory(device), f"lower {keys}")


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can be allocated on a device; None if that is unknown.

    A CPU's are what the machine has left, or less where a control group (a container) limits this process.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    return min([*_free_of_machine(), *_free_of_control_groups()], default=None)


def _check(where: str, num_bytes: int, num_free: int | None, advice: str) -> None:
    if num_free is not None and num_bytes > num_free:
        raise ConfigError(f"{where}: {_gib(num_bytes)} of memory are needed, {_gib(num_free)} are free; {advice}")


def _gib(num_bytes: int) -> str:
    return (
        f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 10 * 2**20 or not num_bytes else f"{num_bytes / 2**20:.2f} MiB"
    )


def _free_of_machine() -> Iterator[int]:
    fields = dict(line.split(":", 1) for line in _read_lines(PROC / "meminfo"))
    if "MemAvailable" in fields:
        yield int(fields["MemAvailable"].split()[0]) * 1024


def _free_of_control_groups() -> Iterator[int]:
    """Yield what each limit on this process leaves, its own group's and those of the groups around it."""
    for line in _read_lines(PROC / "self" / "cgroup"):
        _, controllers, group = line.split(":", 2)
        if not controllers:
            yield from _free_of_group(CGROUPS, group, _VERSION_2)
        elif "memory" in controllers.split(","):
            yield from _free_of_group(CGROUPS / "memory", group, _VERSION_1)


def _free_of_group(root: Path, group: str, files: tuple[str, str, str]) -> Iterator[int]:
    limit_file, usage_file, cache_field = files
    folder = root / group.lstrip("/")  # within a container it may not exist; the root then carries the limit
    for place in (folder, *folder.parents):
        limit, usage = _read_number(place / limit_file), _read_number(place / usage_file)
        if limit is not None and usage is not None:
            statistics = dict(line.split(" ", 1) for line in _read_lines(place / "memory.stat"))
            yield max(0, limit - usage + int(statistics.get(cache_field, 0)))
        if place == root:
            return


def _read_number(path: Path) -> int | None:
    lines = _read_lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None  # "max" is no limit


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
