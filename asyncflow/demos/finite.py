"""Numbers of an HDF5 file as float32, the type that everything here computes in.

Owns the refusal of what is not finite in it: one such number would make every weight of a policy NaN.
"""

from __future__ import annotations

import h5py
import numpy as np
import torch
from torch import Tensor

from asyncflow.errors import ConfigError


def read_finite(dataset: h5py.Dataset, source: str) -> Tensor:
    """Return a dataset of numbers, a row a step.

    Args:
        dataset: What to read.
        source: Names the file in a refusal.

    Raises:
        ConfigError: A number is not finite, or too large for float32; the message names its place and its step.
    """
    stored = dataset[()]
    with np.errstate(over="ignore"):
        numbers = torch.from_numpy(stored.astype(np.float32))  # numpy reads types that torch lacks, big-endian ones too
    is_bad = ~numbers.isfinite()
    if bool(is_bad.any()):
        place = tuple(int(index) for index in is_bad.nonzero()[0])
        raise ConfigError(
            f"{source}: {dataset.name}: step {place[0]} holds {stored[place]}; every number must be finite in float32"
        )
    return numbers
