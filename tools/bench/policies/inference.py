"""Time a decision: as it is, compiled, and replayed from a CUDA graph.

Owns the clock around a decision, from the observation to the actions on the CPU. It must not know which policies are
compared. Needs no simulator, but for `find_spec` of a simulated task.

Shapes: n decisions at once.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from asyncflow.config.sections import CompileMode, Config
from asyncflow.devices import resolve_device
from asyncflow.envs import make_vec_env
from asyncflow.policies import Policy, make_policy
from asyncflow.profile.leg import change
from asyncflow.rollout.inference import Sampler, make_sampler
from asyncflow.rollout.staging import Staging
from asyncflow.rollout.streams import collector_stream
from asyncflow.rollout.weights import make_acting_copy
from asyncflow.seeding import policy_noise
from asyncflow.simulators.spec import EnvSpec

BATCHES = (16, 1)
NUM_WARMUP = 3
CACHE = "TORCHINDUCTOR_CACHE_DIR"


def modes_on(device: torch.device) -> list[CompileMode]:
    """Return what `policy.compile` can be on a device."""
    return ["none", "compile", "graph"] if device.type == "cuda" else ["none", "compile"]


def find_spec(config: Config) -> EnvSpec:
    """Return what the environments of a configuration are like, as one of them says."""
    one = change(config, {"env.num_workers": 1})
    env = make_vec_env(one.env, one.policy.n_action_steps, 1, seed=0)
    try:
        return env.spec
    finally:
        env.close()


def build(config: Config, spec: EnvSpec) -> Policy:
    """Return a configuration's policy with fresh weights, on the threads and the device that it asks for."""
    torch.set_num_threads(config.trainer.num_threads)
    policy = make_policy(config.policy, spec, config.trainer.seed)
    return policy.to(resolve_device(config.trainer.device))


def randomised(obs: TensorDictBase) -> TensorDict:
    """Return observations of the same shapes: any byte, standard normal numbers."""

    def draw(x: Tensor) -> Tensor:
        if x.is_floating_point():
            return torch.randn_like(x)
        return torch.randint(256, x.shape, device=x.device).to(x.dtype)

    drawn = obs.apply(draw)
    assert isinstance(drawn, TensorDict)  # only an `apply` to nothing returns None
    return drawn


def time_decisions(
    policy: Policy, sample: Sampler, obs: TensorDictBase, noise: Tensor, num_decisions: int
) -> list[float]:
    """Return the seconds of each decision as the collector makes it, on a stream as it has; warm-up comes before.

    Args:
        policy: The acting copy; it makes of observations what the ring keeps, within the time.
        sample: What decides on that.
        obs: [n] observations on the policy's device.
        noise: [n, noise_size] on the CPU.
        num_decisions: How many are timed.
    """
    device, seconds = next(policy.parameters()).device, []
    staging = Staging(device)
    with torch.no_grad(), collector_stream(device):
        for _ in range(num_decisions + NUM_WARMUP):
            start = time.perf_counter()
            decision = sample(policy.encode_obs(obs), staging.send("noise", {"noise": noise})["noise"])
            staging.fetch(decision["actions"])  # sync: what is timed ends with the actions
            seconds.append(time.perf_counter() - start)
    return seconds[NUM_WARMUP:]


def measure_decisions(config: Config, spec: EnvSpec, num_envs: int, num_decisions: int) -> list[dict[str, Any]]:
    """Time decisions of `num_envs` environments in every way that the device allows, there and back.

    Returns:
        A row for each way: `mode`, `num_envs`, `build_s` (compiling or capturing and the first decision, with nothing
        cached; None where nothing is built), and what `spread_of` returns.
    """
    policy = make_acting_copy(build(config, spec))
    device = next(policy.parameters()).device
    obs = randomised(spec.empty_obs(num_envs)).to(device)
    noise = policy_noise(0, range(num_envs), 0, policy.noise_size)
    with torch.no_grad():
        encoded = policy.encode_obs(obs)
    modes, samplers, build_s = modes_on(device), {}, {}
    for mode in modes:
        with fresh_compiler_cache():
            start = time.perf_counter()
            samplers[mode] = make_sampler(policy, mode, encoded, noise.to(device))
            build_s[mode] = None if mode == "none" else time.perf_counter() - start
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for mode in [*modes, *reversed(modes)]:
        seconds[mode] += time_decisions(policy, samplers[mode], obs, noise, num_decisions // 2)
    rows = [{"mode": mode, "num_envs": num_envs, "build_s": build_s[mode]} for mode in modes]
    return [row | spread_of(seconds[str(row["mode"])]) for row in rows]


@contextmanager
def fresh_compiler_cache() -> Iterator[None]:
    """Let the compiler keep what it writes in a folder that is removed, and find nothing that is there already."""
    before = os.environ.get(CACHE)
    with tempfile.TemporaryDirectory(prefix="asyncflow_compiled_") as folder:
        os.environ[CACHE] = folder
        try:
            yield
        finally:
            os.environ.pop(CACHE)
            if before is not None:
                os.environ[CACHE] = before


def spread_of(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median, the first and the last decile of seconds, and how many they are."""
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"median_s": statistics.median(seconds), "low_s": deciles[0], "high_s": deciles[-1], "num": len(seconds)}
