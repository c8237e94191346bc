"""The schema of `state.json` and of a checkpoint's tensors, checked before anything is built from them.

It checks names, types and ranges. Whether a state fits a run is checked where the run is built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, model_validator
from torch import Tensor

from asyncflow.config.sections import explain
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.errors import CheckpointError
from asyncflow.metrics.glossary import GLOSSARY
from asyncflow.policies.policy_file import check_finite

Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
_WEIGHTS = re.compile(r"weights_(\d{1,18})", re.ASCII)


class Books(BaseModel):
    """Where all decisions went."""

    model_config = ConfigDict(strict=True)

    collected: Count
    trained: Count
    dropped: Count
    invalid: Count
    in_flight: Count

    @model_validator(mode="after")
    def _check_balance(self) -> Books:
        if self.collected != self.trained + self.dropped + self.invalid + self.in_flight:
            raise ValueError("books: collected must be trained + dropped + invalid + in_flight")
        return self


class StoredState(BaseModel):
    """`state.json`. What is not named here is taken as it is."""

    model_config = ConfigDict(strict=True, extra="allow")

    format: int
    env_steps: Count
    decisions: Count
    updates: Count
    next_rollout: Count
    faults: dict[str, Count]
    best_success: FiniteFloat
    best_update: Count
    books: Books
    num_nonfinite_steps: Count
    is_evaluation_owed: bool
    row: dict[str, float]
    episodes: list[tuple[int, FiniteFloat, Count, bool]] = []

    @model_validator(mode="after")
    def _check_row(self) -> StoredState:
        if unknown := sorted(self.row.keys() - GLOSSARY.keys()):
            raise ValueError(f"row: no such metric: {unknown[0]!r}")
        if self.updates and not {"env_steps", "updates"} <= self.row.keys():
            raise ValueError("row: lacks env_steps or updates")
        return self


_STATE = TypeAdapter(StoredState)


def check_state(content: bytes) -> None:
    """Check what `state.json` holds.

    Raises:
        CheckpointError: A value is missing, of another type or out of its range; one line that names it.
    """
    try:
        _STATE.validate_json(content)
    except ValidationError as error:
        raise CheckpointError(f"state.json: {explain(error)}") from None


def check_groups(groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Check the tensors that training goes on from.

    Raises:
        CheckpointError: There is a group of another kind, versions of the weights are missing or newer than the
            state, a number is not finite, or the journal rebuilds nothing; one line.
    """
    versions = set()
    for name, tensors in groups.items():
        check_finite(tensors, f"training.safetensors: {name}")
        if version := _WEIGHTS.fullmatch(name):
            versions.add(int(version[1]))
        elif name not in ("optimizer", "journal"):
            raise CheckpointError(f"training.safetensors: {name!r}: no group of a checkpoint")
    if state["updates"] != max(versions, default=None):
        raise CheckpointError(
            f"training.safetensors: the newest weights are of version {max(versions, default=None)}, those of "
            f"{state['updates']} are needed"
        )
    if journal := groups.get("journal"):
        try:
            EpisodeJournal.from_tensors(dict(journal))
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"training.safetensors: journal: {' '.join(str(error).split())}") from None
