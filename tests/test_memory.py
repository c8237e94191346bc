"""Free memory from made-up figures, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from asyncflow import devices
from asyncflow.devices import check_memory, free_memory
from asyncflow.errors import ConfigError

GIB = 2**30
CPU = torch.device("cpu")
Machine = Callable[[dict[str, str]], None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return what makes a machine of files: path under /proc or /sys/fs/cgroup -> content."""
    monkeypatch.setattr(devices, "PROC", tmp_path / "proc")
    monkeypatch.setattr(devices, "CGROUPS", tmp_path / "cgroup")

    def write(files: dict[str, str]) -> None:
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)

    return write


def meminfo(gib: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {gib * GIB // 1024} kB\n"}


def group(folder: str, limit: int | str, usage: int, cache: int = 0) -> dict[str, str]:
    return {
        f"cgroup/{folder}memory.max": f"{limit}\n",
        f"cgroup/{folder}memory.current": f"{usage}\n",
        f"cgroup/{folder}memory.stat": f"anon 1\ninactive_file {cache}\n",
    }


def test_without_limits_a_cpu_has_what_the_machine_has_left(machine: Machine) -> None:
    machine(meminfo(8))
    assert free_memory(CPU) == 8 * GIB


def test_a_control_group_s_limit_counts_if_it_is_less(machine: Machine) -> None:
    machine(meminfo(8) | {"proc/self/cgroup": "0::/job\n"} | group("job/", 4 * GIB, 3 * GIB))
    assert free_memory(CPU) == GIB
    machine(meminfo(8) | group("job/", 40 * GIB, 3 * GIB))
    assert free_memory(CPU) == 8 * GIB


def test_the_limits_of_the_groups_around_it_count_too(machine: Machine) -> None:
    outer = group("slice/", 5 * GIB, 3 * GIB)
    machine(meminfo(8) | {"proc/self/cgroup": "0::/slice/job\n"} | outer | group("slice/job/", "max", GIB))
    assert free_memory(CPU) == 2 * GIB


def test_a_container_s_limit_is_at_the_root(machine: Machine) -> None:
    machine(meminfo(8) | {"proc/self/cgroup": "0::/not/mounted\n"} | group("", 4 * GIB, 2 * GIB))
    assert free_memory(CPU) == 2 * GIB


def test_cache_that_can_be_dropped_is_free(machine: Machine) -> None:
    machine(meminfo(8) | {"proc/self/cgroup": "0::/\n"} | group("", 4 * GIB, 4 * GIB, cache=3 * GIB))
    assert free_memory(CPU) == 3 * GIB


def test_control_groups_of_version_1_count(machine: Machine) -> None:
    limits = {
        "proc/self/cgroup": "7:cpu,cpuacct:/job\n4:memory:/job\n",
        "cgroup/memory/job/memory.limit_in_bytes": f"{4 * GIB}",
        "cgroup/memory/job/memory.usage_in_bytes": f"{2 * GIB}",
        "cgroup/memory/job/memory.stat": f"total_inactive_file {GIB}\n",
        "cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "cgroup/memory/memory.usage_in_bytes": f"{9 * GIB}",
    }
    machine(meminfo(8) | limits)
    assert free_memory(CPU) == 3 * GIB


def test_a_group_over_its_limit_has_nothing_left(machine: Machine) -> None:
    machine(meminfo(8) | {"proc/self/cgroup": "0::/\n"} | group("", GIB, 2 * GIB))
    assert free_memory(CPU) == 0


def test_cuda_is_asked_about_the_device_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (3 * GIB, 9 * GIB))
    assert free_memory(torch.device("cuda:1")) == 3 * GIB
    assert asked == [torch.device("cuda:1")]


def test_where_nobody_says_what_is_free_nothing_is_refused(machine: Machine) -> None:
    for device in (CPU, torch.device("mps")):
        assert free_memory(device) is None
        check_memory(10**18, device, "buffer.buffer_size")


def test_what_fits_is_not_refused(machine: Machine) -> None:
    machine(meminfo(8))
    check_memory(8 * GIB, CPU, "buffer.buffer_size")


def test_what_does_not_fit_is_refused_with_figures_and_keys(machine: Machine) -> None:
    machine(meminfo(8))
    with pytest.raises(ConfigError) as refused:
        check_memory(12 * GIB, CPU, "buffer.buffer_size or env.num_envs")
    assert str(refused.value) == (
        "device cpu: 12.00 GiB of memory are needed, 8.00 GiB are free; lower buffer.buffer_size or env.num_envs"
    )


def test_this_machine_says_what_is_free() -> None:
    free = free_memory(CPU)
    assert free is None or 0 < free < 2**50
