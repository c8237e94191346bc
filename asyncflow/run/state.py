"""RunState: the plain values of a checkpoint, as `state.json` holds them, checked before anything is built from them.

Names, types and ranges of the values are checked here, and those of the tensors beside them. Whether a state fits a
run is checked where the run is built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, field
from typing import Annotated

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from asyncflow.config.sections import explain
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.errors import CheckpointError
from asyncflow.metrics.glossary import is_known
from asyncflow.policies.policy_file import check_finite
from asyncflow.rollout.episodes import Episode

FORMAT = 1  # of what a checkpoint holds
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
_WEIGHTS = re.compile(r"weights_(\d{1,18})", re.ASCII)
_STRICT = ConfigDict(strict=True)


@dataclass(frozen=True, config=_STRICT)
class Books:
    """Counts of where all decisions went."""

    collected: Count = 0
    trained: Count = 0
    dropped: Count = 0
    invalid: Count = 0
    in_flight: Count = 0

    @model_validator(mode="after")
    def _check_balance(self) -> Books:
        if self.collected != self.trained + self.dropped + self.invalid + self.in_flight:
            raise ValueError("books: collected must be trained + dropped + invalid + in_flight")
        return self


@dataclass(frozen=True, config=_STRICT)
class RunState:
    """Plain values from which a run goes on, at the boundary after an update.

    Attributes:
        env_steps: Executed simulator steps of all trained decisions.
        decisions: Trained decisions.
        updates: Finished updates, which is the version of the weights.
        next_rollout: Number of the first rollout that is collected after the boundary.
        faults: How many faults of each kind were survived.
        best_success: Success rate of the best evaluation after an update that was saved; -1 before the first.
        best_update: That update; 0 before the first.
        books: Where all decisions went.
        num_nonfinite_steps: Minibatches that were skipped because a number was not finite.
        is_evaluation_owed: Whether the evaluation of this update is still due.
        row: The last row of metrics.
        episodes: Episodes that ended and that no row counts yet.
    """

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
    row: dict[str, int | float]
    episodes: list[Episode] = field(default_factory=list)

    @model_validator(mode="after")
    def _check_row(self) -> RunState:
        if unknown := sorted(name for name in self.row if not is_known(name)):
            raise ValueError(f"row: no such metric: {unknown[0]!r}")
        if self.updates and not {"env_steps", "updates"} <= self.row.keys():
            raise ValueError("row: lacks env_steps or updates")
        return self

    def to_json(self) -> str:
        """Return the content of `state.json`."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, content: bytes) -> RunState:
        """Return the state that `state.json` holds; keys that this asyncflow does not know are left out.

        Raises:
            CheckpointError: It is no JSON, of another format, or a value is missing, of another type or out of its
                range; one line that names it.
        """
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"state.json: damaged or incomplete: {' '.join(str(error).split())}") from None
        version = found.get("format") if isinstance(found, dict) else None
        if version != FORMAT:
            raise CheckpointError(f"state.json: format {version}, this asyncflow reads {FORMAT}")
        try:
            return _STATE.validate_json(content)
        except ValidationError as error:
            raise CheckpointError(f"state.json: {explain(error)}") from None


_STATE = TypeAdapter(RunState)


def check_groups(groups: Mapping[str, Mapping[str, Tensor]], state: RunState) -> None:
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
    if state.updates != max(versions, default=None):
        raise CheckpointError(
            f"training.safetensors: the newest weights are of version {max(versions, default=None)}, those of "
            f"{state.updates} are needed"
        )
    if journal := groups.get("journal"):
        try:
            EpisodeJournal.from_tensors(dict(journal))
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"training.safetensors: journal: {' '.join(str(error).split())}") from None


def name_snapshots(snapshots: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Mapping[str, Tensor]]:
    """Return versions of the weights as groups of a checkpoint."""
    return {f"weights_{version}": tensors for version, tensors in snapshots.items()}


def read_snapshots(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[int, Mapping[str, Tensor]]:
    """Return what `name_snapshots` named."""
    return {int(name.removeprefix("weights_")): x for name, x in groups.items() if name.startswith("weights_")}
