"""Keyed randomness: every draw is a pure function of (run seed, purpose, indices), never of what was drawn before.

This file maps keys to random numbers. No global generator is touched, so threads, groups and resumed runs draw the same
numbers whatever the timing. The streams are Philox counters (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", 2011), which numpy implements identically on every platform.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """Return a 63-bit seed that depends on every argument and on nothing else.

    Args:
        seed: The run's seed.
        purpose: What the numbers are for, such as `"episode"`; separates streams that share indices.
        indices: Counters such as environment and episode.
    """
    text = ":".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def policy_noise(seed: int, env_ids: Iterable[int], decision: int, size: int) -> Tensor:
    """Return the standard normal numbers that one decision of each environment uses, `[n, size]` float32 on CPU.

    Args:
        seed: The run's seed.
        env_ids: The environments that decide.
        decision: How many decisions each of them has made before this one.
        size: Numbers per decision, `Policy.noise_size`.
    """
    import torch  # noqa: PLC0415  simulators' processes do without it

    key = derive_seed(seed, "policy_noise")
    rows = [
        np.random.Generator(np.random.Philox(key=key, counter=[0, 0, env, decision])).standard_normal(size, np.float32)
        for env in env_ids
    ]
    return torch.from_numpy(np.stack(rows))


def permutation(seed: int, update: int, epoch: int, size: int) -> Tensor:
    """Return the minibatch order of one epoch, `[size]` int64 on CPU."""
    import torch  # noqa: PLC0415

    rng = np.random.default_rng(derive_seed(seed, "minibatch", update, epoch))
    return torch.from_numpy(rng.permutation(size))
