"""How large a policy would be, counted on a draft without memory before it is built.

Owns the count. It must not know how a policy is built.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import nn

from asyncflow.config.observations import IMAGES
from asyncflow.config.sections import PolicyConfig
from asyncflow.envs.base import EnvSpec
from asyncflow.errors import ConfigError
from asyncflow.resources import check_memory

MAX_UNCHECKED = 1 << 24  # numbers; a draft takes as long as a small policy
KEYS = "policy.hidden_sizes, policy.critic_hidden_sizes, policy.horizon or env.n_obs_steps"


def is_large(config: PolicyConfig, spec: EnvSpec) -> bool:
    """Tell whether the fully connected layers alone may hold more than `MAX_UNCHECKED` numbers."""
    inputs = sum(math.prod(field.shape) for field in spec.obs.values() if field.kind != IMAGES)
    outputs = config.horizon * spec.action_dim
    networks = ([inputs, *config.hidden_sizes, outputs], [inputs, *config.critic_hidden_sizes])
    return sum(a * b for sizes in networks for a, b in itertools.pairwise(sizes)) > MAX_UNCHECKED


def check_size(build: Callable[[], nn.Module], num_stored: int | None) -> None:
    """Refuse a policy that is larger than the memory that is free, or than the weights that are to be loaded into it.

    Args:
        build: Builds the policy.
        num_stored: Numbers of those weights; None if there are none.

    Raises:
        ConfigError: See above.
    """
    try:
        with torch.device("meta"):
            tensors = list(build().state_dict().values())
    except (RuntimeError, OverflowError, TypeError):  # a size beyond 64 bits
        raise ConfigError(f"the policy's sizes are beyond what can be counted; lower {KEYS}") from None
    num_numbers = sum(tensor.numel() for tensor in tensors)
    if num_stored is not None and num_numbers > 2 * num_stored:
        raise ConfigError(f"a policy of {num_numbers} numbers is described, of which the checkpoint holds {num_stored}")
    check_memory(sum(tensor.nbytes for tensor in tensors), torch.device("cpu"), KEYS)
