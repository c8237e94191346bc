"""EnvSpec: what an environment observes and which actions it takes, whichever process or file describes it."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Iterable, Mapping

from asyncflow.config.contracts import broken
from asyncflow.config.observations import KINDS, STATE, VECTOR, Field, make_field, name_in
from asyncflow.config.suites import TaskSpec
from asyncflow.errors import ContractError

if TYPE_CHECKING:
    from tensordict import TensorDict
    from torch import Tensor

    from asyncflow.config.observations import Shape


@dataclass(frozen=True, init=False)
class EnvSpec:
    """Description of an environment's observations and actions, which a policy must fit.

    `EnvSpec({"state": (4,), "images.top": (3, 28, 28)}, action_dim=2, horizon=40)` is enough; a bare shape stands for
    the `Field` that its key means.

    Attributes:
        obs: What an observation holds: vectors, such as `state`, then what cameras yield, by kind. A camera's key is
            `KIND.NAME`: `images.agentview` is `obs["images", "agentview"]`.
        action_dim: A.
        horizon: Env steps until an episode is truncated, at the latest.
        env_meta: robomimic's description from which the environment can be built again; empty for the toy.
        obs_keys: The simulator's names that `state` concatenates, in this order.
        obs_widths: How many numbers each of them has; empty where that is not said.
        task: Name of the task, where `env_meta` does not describe it.
        action_low: The lowest action in each dimension, -1 everywhere if empty; -inf where there is no limit.
        action_high: The highest; 1 everywhere if empty.
        rendered_with: The keys of `env` with which cameras' fields are made and which no shape tells, and their values;
            of LIBERO those that are not the defaults.
        has_success: Whether episodes can succeed; False where only their returns tell how good they are.
        instruction: What the robot is told to do, in words; empty if nothing is.
        num_start_states: Start states that a benchmark keeps of the task; 0: every episode draws its own.
        tasks: The tasks that environments are spread over, environment i with task i modulo their number, where they
            are several. An observation then holds the index `task`, and what is said above of one task is empty, but
            for `horizon`, the longest one.
    """

    obs: dict[str, Field]
    action_dim: int
    horizon: int
    env_meta: dict[str, Any]
    obs_keys: tuple[str, ...]
    obs_widths: tuple[int, ...]
    task: str
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    rendered_with: dict[str, Any]
    has_success: bool
    instruction: str
    num_start_states: int
    tasks: tuple[TaskSpec, ...]

    def __init__(  # noqa: PLR0913  a record
        self,
        obs: Mapping[str, Field | Shape],
        action_dim: int,
        horizon: int,
        *,
        env_meta: dict[str, Any] | None = None,
        obs_keys: tuple[str, ...] = (),
        obs_widths: tuple[int, ...] = (),
        task: str = "",
        action_low: tuple[float, ...] = (),
        action_high: tuple[float, ...] = (),
        rendered_with: dict[str, Any] | None = None,
        has_success: bool = True,
        instruction: str = "",
        num_start_states: int = 0,
        tasks: tuple[TaskSpec, ...] = (),
    ) -> None:
        """Describe environments; see the attributes.

        Raises:
            ContractError: The limits of actions are not one for each dimension, or a low one is above its high one; or
                `obs` is no mapping.
        """
        if not isinstance(obs, Mapping):
            raise broken("EnvSpec.obs", "is", obs, "a dictionary of shapes, such as {'state': (4,)}")
        values = {
            "obs": _in_order({k: v if isinstance(v, Field) else make_field(k, v) for k, v in obs.items()}),
            "action_dim": action_dim,
            "horizon": horizon,
            "env_meta": {} if env_meta is None else env_meta,
            "obs_keys": obs_keys,
            "obs_widths": obs_widths,
            "task": task,
            "action_low": action_low,
            "action_high": action_high,
            "rendered_with": {} if rendered_with is None else rendered_with,
            "has_success": has_success,
            "instruction": instruction,
            "num_start_states": num_start_states,
            "tasks": tasks,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # frozen
        if {len(action_low), len(action_high)} - {0, action_dim}:
            raise ContractError(
                f"EnvSpec.action_low has {len(action_low)} and action_high {len(action_high)} numbers "
                f"for action_dim = {action_dim}"
            )
        if not all(low <= high for low, high in zip(action_low, action_high)):
            raise ContractError(f"EnvSpec.action_low = {action_low} must not exceed action_high = {action_high}")

    def to_json(self) -> dict[str, Any]:
        """Return the description as JSON holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EnvSpec:
        """Return what `to_json` described."""
        obs = {key: Field(each["kind"], tuple(each["shape"]), each["dtype"]) for key, each in values["obs"].items()}
        tuples = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        tasks = tuple(TaskSpec(**each) for each in values["tasks"])
        return cls(**{**values, **tuples, "obs": obs, "tasks": tasks})

    @property
    def action_limits(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest action, [A] float32 each."""
        import torch  # noqa: PLC0415  simulators' processes do without it

        ones = torch.ones(self.action_dim)
        low = torch.tensor(self.action_low) if self.action_low else -ones
        high = torch.tensor(self.action_high) if self.action_high else ones
        return low, high

    @property
    def task_table(self) -> tuple[TaskSpec, ...]:
        """The tasks, of which there is one at least."""
        return self.tasks or (TaskSpec(self.task, self.instruction, self.horizon, self.num_start_states),)

    @property
    def shortest_horizon(self) -> int:
        """Env steps until an episode of the task with the shortest horizon is truncated."""
        return min(task.horizon for task in self.task_table)

    def task_ids(self, env_ids: Iterable[int]) -> list[int]:
        """Return the place in `task_table` of each environment's task: they take turns."""
        return [env % len(self.task_table) for env in env_ids]

    @property
    def state_shape(self) -> Shape:
        """(D,), or (n_obs_steps, D); empty where there is no `state`."""
        return self.obs[STATE].shape if STATE in self.obs else ()

    @property
    def n_obs_steps(self) -> int:
        """Env steps that one observation shows."""
        return self.state_shape[0] if len(self.state_shape) == 2 else 1

    @property
    def rendered(self) -> dict[str, dict[str, Shape]]:
        """Shapes of what cameras yield: kind -> camera -> shape; a kind that no camera yields is absent."""
        shapes = {kind: self.shapes(kind) for kind in KINDS}
        return {kind: by_camera for kind, by_camera in shapes.items() if by_camera}

    def shapes(self, kind: str) -> dict[str, Shape]:
        """Return the shapes of the fields of one kind, by the camera's or the vector's name."""
        return {name_in(kind, key): each.shape for key, each in self.obs.items() if each.kind == kind}

    def name_number(self, column: int) -> str:
        """Return what a number of `state` is: its place and, where that is known, the simulator's name for it."""
        ends = itertools.accumulate(self.obs_widths)
        name = next((key for key, end in zip(self.obs_keys, ends) if column < end), "")
        return f"state[{column}]" + (f" ({name})" if name else "")

    def with_history(self, n_obs_steps: int) -> EnvSpec:
        """Return the description of observations of the last `n_obs_steps` env steps; of one, it stays as it is."""
        if n_obs_steps == 1:
            return self
        return replace(self, obs={key: each.with_history(n_obs_steps) for key, each in self.obs.items()})

    def empty_obs(self, num_envs: int) -> TensorDict:
        """Return observations of nothing, [N]: vectors, and by kind and camera what cameras yield."""
        import torch  # noqa: PLC0415
        from tensordict import TensorDict  # noqa: PLC0415

        obs = TensorDict({}, batch_size=[num_envs])
        for key, each in self.obs.items():
            obs[each.path(key)] = torch.zeros(num_envs, *each.shape, dtype=getattr(torch, each.dtype))
        return obs


def _in_order(fields: Mapping[str, Field]) -> dict[str, Field]:
    """Return vectors first, then what cameras yield, by kind: networks and random numbers come in this order."""
    order = [VECTOR, *KINDS]
    kinds = [*order, *(each.kind for each in fields.values() if each.kind not in order)]
    return dict(sorted(fields.items(), key=lambda item: kinds.index(item[1].kind)))
