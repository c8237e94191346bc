"""Recipe: what a saved trainer is built from again, and which of its parts its user has to bring along.

A program gives a trainer objects. Those that asyncflow made can be made again from their configuration; a class of the
user's own cannot, and is named.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from asyncflow.config.contracts import name_of
from asyncflow.config.sections import Config, validate
from asyncflow.devices import resolve_device
from asyncflow.envs.base import VecEnv
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.envs.mapping import NameMapping, map_names
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.files import follow
from asyncflow.policies.base import Policy
from asyncflow.policies.policy_file import check_tensors
from asyncflow.ppo.ppo import PPO
from asyncflow.ppo.promises import check_promises
from asyncflow.run.auxiliary import build_ppo
from asyncflow.run.checkpoint import Checkpoint, find_newest, load_checkpoint
from asyncflow.run.collecting import LoopSettings
from asyncflow.run.folder import resume_config
from asyncflow.run.parts import build_env, build_policy, settle_environment

RECIPE = "trainer.json"
FORMAT = 1


@dataclass(frozen=True)
class Recipe:
    """The settings that a saved trainer is built from.

    Attributes:
        config: The keys of all sections; those of parts that have to be given mean nothing.
        given: `policy`, `env` or `ppo` -> what its user gave, where asyncflow cannot build it.
        env_seed: The seed with which environments were made.
        ppo_seed: The seed of PPO's minibatches.
        total_updates: Updates over which PPO's step size changes; None: those of the next call of `train`.
    """

    config: Config
    given: dict[str, str]
    env_seed: int
    ppo_seed: int
    total_updates: int | None = None

    @classmethod
    def describe(cls, policy: Policy, env: VecEnv, ppo: PPO, settings: LoopSettings) -> Recipe:
        """Describe a trainer's parts.

        Raises:
            ConfigError: The settings do not go together.
        """
        loop = asdict(settings)
        made = {"horizon": policy.horizon, "n_action_steps": policy.n_action_steps}
        sections: dict[str, Any] = {
            "env": env.origin.config.model_dump(by_alias=True) if env.origin else {},
            "policy": policy.made_from.model_dump(by_alias=True) if policy.made_from else made,
            "algorithm": ppo.config.model_dump(by_alias=True),
            "buffer": {key: loop[key] for key in ("buffer_size", "max_policy_lag", "lag_mode", "on_full")},
            "collector": {"num_env_groups": settings.num_env_groups},
            "trainer": {"buffer_type": settings.buffer_type, "seed": settings.seed},
        }
        sections["env"]["num_envs"] = env.num_envs
        sections["policy"]["compile"] = settings.compile
        sections["trainer"]["device"] = str(next(policy.parameters()).device)
        given = {
            "policy": None if policy.made_from else policy,
            "env": None if env.origin else env,
            "ppo": None if ppo.is_described else ppo,
        }
        return cls(
            validate(sections),
            {name: name_of(part) for name, part in given.items() if part is not None},
            env.origin.seed if env.origin else settings.seed,
            settings.seed if ppo.seed is None else ppo.seed,
            ppo.total_updates,
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `Trainer`."""
        return loop_arguments(self.config)

    def to_json(self) -> str:
        """Return the content of `trainer.json`."""
        values = vars(self) | {"config": self.config.model_dump(by_alias=True)}
        return json.dumps({"format": FORMAT, **values}, indent=2)

    @classmethod
    def from_json(cls, content: bytes) -> Recipe:
        """Return what `to_json` wrote.

        Raises:
            CheckpointError: It is damaged, or of another version; one line.
        """
        try:
            values = json.loads(content)
            if values.pop("format") != FORMAT:
                raise ValueError(f"format must be {FORMAT}")
            return cls(**values | {"config": validate(values["config"])})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError) as error:
            raise CheckpointError(f"{RECIPE}: damaged, or of another version: {' '.join(str(error).split())}") from None

    def check_given(self, **parts: object) -> None:
        """Refuse to go on without a part that asyncflow cannot build.

        Raises:
            ConfigError: One is missing.
        """
        missing = {name: what for name, what in self.given.items() if parts.get(name) is None}
        if missing:
            words = ", ".join(f"{name}={what}(...)" for name, what in missing.items())
            raise ConfigError(
                f"Trainer.resume: asyncflow cannot build what the trainer was given; give it again: {words}"
            )

    def check_folder(self, folder: Path) -> None:
        """Refuse to replace anything but another saved trainer.

        Raises:
            ConfigError: Something else is there.
        """
        is_own = (folder / RECIPE).is_file() or (folder.is_dir() and not any(folder.iterdir()))
        if (folder.exists() or folder.is_symlink()) and (folder.is_symlink() or not is_own):
            raise ConfigError(
                f"Trainer.save({str(folder)!r}): holds something else than a saved trainer; choose another"
            )


@dataclass(frozen=True)
class Saved:
    """A saved trainer: its checkpoint, and how to build the trainer again."""

    recipe: Recipe
    checkpoint: Checkpoint

    def build_env(self) -> VecEnv:
        """Build the environments as they were, in the policy's names."""
        config = settle_environment(self.recipe.config, self.checkpoint)
        seeded = config.trainer.model_copy(update={"seed": self.recipe.env_seed})
        env = build_env(config.model_copy(update={"trainer": seeded}), "train", config.env.num_envs)
        return map_names(env, NameMapping(config.policy.mapping, env.spec))

    def build_policy(self, env: VecEnv) -> Policy:
        """Build the policy with its weights, on the device that it was on."""
        config = self.recipe.config
        mapping = NameMapping(config.policy.mapping, env.simulator_spec)
        return build_policy(config, mapping, resolve_device(config.trainer.device), self.checkpoint)

    def load_into(self, policy: Policy) -> Policy:
        """Give a policy of the user's own the weights that it had.

        Raises:
            CheckpointError: They do not fit it.
        """
        check_tensors(policy.state_dict(), self.checkpoint.policy, str(self.checkpoint.path))
        policy.load_state_dict(self.checkpoint.policy)
        policy.anneal(self.checkpoint.state.updates)
        return policy

    def build_ppo(self, policy: Policy, env: VecEnv) -> PPO:
        """Build what updates the policy."""
        ppo = build_ppo(self.recipe.config, policy, env.simulator_spec)
        ppo.seed, ppo.total_updates = self.recipe.ppo_seed, self.recipe.total_updates
        return ppo


def loop_arguments(config: Config) -> dict[str, Any]:
    """Return the keyword arguments of `Trainer` that a configuration means."""
    return {
        "buffer_size": config.buffer.buffer_size,
        "buffer_type": config.trainer.buffer_type,
        "max_policy_lag": config.buffer.max_policy_lag,
        "lag_mode": config.buffer.lag_mode,
        "on_full": config.buffer.on_full,
        "num_env_groups": config.collector.num_env_groups,
        "compile": config.policy.compile,
        "seed": config.trainer.seed,
    }


def read_saved(path: Path) -> Saved:
    """Read what `Trainer.save` wrote, or of a run of `asyncflow train` its newest checkpoint or the one named.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    if (path / RECIPE).is_file():
        checkpoint = load_checkpoint(path)
        return Saved(Recipe.from_json((path / RECIPE).read_bytes()), checkpoint)
    if (path / "config.yaml").is_file():
        return Saved(_read_run(path), find_newest(path)[0])
    checkpoint_folder = follow(path).resolve()
    if (checkpoint_folder.parents[1] / "config.yaml").is_file():
        return Saved(_read_run(checkpoint_folder.parents[1]), load_checkpoint(checkpoint_folder))
    raise CheckpointError(f"Trainer.resume({str(path)!r}): no trainer was saved there (no {RECIPE}), and it is no run")


def _read_run(folder: Path) -> Recipe:
    config = resume_config(folder, {})
    return Recipe(config, {}, config.trainer.seed, config.trainer.seed, config.trainer.total_updates)


def check_kinds(env: Any, ppo: Any, reporter: Any, callbacks: Any) -> None:
    """Refuse arguments of a trainer that are of another kind than expected.

    Raises:
        ConfigError: One is; names it.
    """
    is_reporter = all(callable(getattr(reporter, name, None)) for name in ("update", "notice"))
    are_functions = isinstance(callbacks, Sequence) and all(map(callable, callbacks))
    expected = {
        "env": (env, isinstance(env, VecEnv), "environments, such as make_env(...)"),
        "ppo": (ppo, isinstance(ppo, PPO), "PPO(policy, ...)"),
        "reporter": (
            reporter,
            reporter is None or (is_reporter and not isinstance(reporter, type)),
            "an object with update(row) and notice(text), such as ConsoleReporter()",
        ),
        "callbacks": (callbacks, are_functions, "a list of functions of the trainer and its row"),
    }
    for name, (value, is_expected, words) in expected.items():
        if not is_expected:
            raise ConfigError(f"Trainer({name}={value!r}): expected {words}")


def check_agreement(policy: Policy, env: VecEnv, ppo: PPO) -> None:
    """Refuse parts that do not fit together.

    Raises:
        ConfigError: `ppo` updates another policy; or policy and environments differ in the actions of a chunk or in
            the size of an action.
        ContractError: A policy of another package breaks a promise; names the method and the promise.
    """
    if ppo.policy is not policy:
        raise ConfigError("ppo updates another policy than the trainer was given; write PPO(policy, ...) with this one")
    check_sizes(policy, env)
    made_from, is_own = policy.made_from, type(policy).__module__.startswith("asyncflow.")
    if (not is_own) if made_from is None else made_from.is_from_elsewhere:
        check_promises(policy, policy.n_action_steps, env.spec)


def check_sizes(policy: Policy, env: VecEnv) -> None:
    """Refuse a policy that decides other chunks or other actions than environments execute, or for other tasks.

    Raises:
        ConfigError: See above; says how to make them agree.
    """
    if env.n_action_steps not in (None, policy.n_action_steps):
        raise ConfigError(
            f"n_action_steps: the environments execute {env.n_action_steps} actions of a chunk and the policy decides "
            f"{policy.n_action_steps}; they must agree: make_env(..., n_action_steps={policy.n_action_steps}) or "
            f"make_policy(..., n_action_steps={env.n_action_steps})"
        )
    if env.spec.action_dim != policy.action_dim:
        raise ConfigError(
            f"the environments' actions have {env.spec.action_dim} dimensions and the policy's {policy.action_dim}; "
            "make the policy for these environments: make_policy(kind, env)"
        )
    if 1 < policy.num_tasks != len(env.spec.task_table):
        raise ConfigError(
            f"the policy was made for {policy.num_tasks} tasks and the environments have {len(env.spec.task_table)}; "
            "make the policy for these environments: make_policy(kind, env)"
        )


def check_journal(journal: EpisodeJournal | None, env: VecEnv, policy: Policy, path: Path) -> None:
    """Refuse to replay episodes of other environments or of other chunks than a trainer's.

    Raises:
        CheckpointError: See above.
    """
    if journal is None:
        return
    expected = (policy.n_action_steps, env.simulator_spec.action_dim)
    shapes = {tuple(chunk.shape) for chunks in journal.chunks for chunk in chunks}
    if len(journal.episodes) != env.num_envs or shapes - {expected}:
        raise CheckpointError(
            f"{path}: its journal is of {len(journal.episodes)} environments and chunks of {sorted(shapes)}; the run "
            f"has {env.num_envs} and {expected} (policy.n_action_steps, action size)"
        )
