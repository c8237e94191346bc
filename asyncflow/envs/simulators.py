"""Environments of one's own in worker processes, with arguments as a notebook would write them.

`SimulatorVecEnv` runs any `Simulator`, `GymVecEnv` any environment of gymnasium.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from asyncflow.config.interpreters import choose_interpreter
from asyncflow.config.plugins import check_simulator, is_named_simulator
from asyncflow.config.sections import EnvConfig, validate
from asyncflow.config.tasks import GYM
from asyncflow.envs.worker import Recipe, SimulatorFactories
from asyncflow.envs.workers import WorkerVecEnv
from asyncflow.errors import ConfigError
from asyncflow.simulators.gym import GymSettings, GymSimulator, find_env, import_gymnasium, make_registered

if TYPE_CHECKING:
    import gymnasium


class SimulatorVecEnv(WorkerVecEnv):
    """N environments, each a `Simulator`, in worker processes; `WorkerVecEnv` says what happens to workers that fail.

    Episode e of environment i starts from `derive_seed(seed, "episode", i, e)`, where `seed` is what `reset` is given.
    To resume a run exactly, an episode must be a function of its environment's construction, its seed and its actions:
    asyncflow replays the actions, and says so if that leads to another state.
    """

    def __init__(  # noqa: PLR0913  what a user may want to say, each by its name
        self,
        make_simulator: SimulatorFactories | str,
        num_envs: int = 16,
        n_action_steps: int = 4,
        *,
        num_workers: int | None = None,
        python: str | None = None,
        seed: int = 0,
        n_obs_steps: int = 1,
        step_timeout_s: float = 120.0,
        max_restarts: int = 10,
        restart_window_s: float = 600.0,
    ) -> None:
        """Start the workers and wait until each has constructed its simulators.

        Args:
            make_simulator: Seed -> simulator, such as its class. It runs in the workers; functions and classes of a
                script or a notebook are sent along. For another interpreter its name, `"my_simulator:Reach"`, or with
                arguments a `Recipe`. For several tasks a mapping from their names to what makes each.
            num_envs: Environments, N.
            n_action_steps: Actions of a chunk, H, which must be the policy's.
            num_workers: Processes, of which at most N are used; None means one for each CPU core.
            python: Interpreter that simulates, the folder of its virtual environment, or a kind of `asyncflow envs`;
                None means this one.
            seed: Environment i is constructed from `derive_seed(seed, "simulator", i)`.
            n_obs_steps: Env steps that one observation shows.
            step_timeout_s: A worker that is silent for longer is replaced; its episodes are lost.
            max_restarts: Workers replaced within `restart_window_s`; one more is an `EnvError`.
            restart_window_s: Seconds over which `max_restarts` counts.

        Raises:
            EnvError: A simulator could not be constructed.
            ConfigError: It cannot be constructed as asked or breaks its contract, or an argument is out of its range.
        """
        for name, value in (("num_envs", num_envs), ("n_action_steps", n_action_steps)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} = {value!r}: expected a whole number of at least 1")
        if isinstance(make_simulator, str):
            if not is_named_simulator(make_simulator):
                raise ConfigError(
                    f"make_simulator = {make_simulator!r}: expected module:Class, as in my_simulator:Reach"
                )
            make_simulator = Recipe(make_simulator)
        values: dict[str, Any] = {"num_workers": num_workers, "python": python, "n_obs_steps": n_obs_steps}
        values |= {"step_timeout_s": step_timeout_s, "max_restarts": max_restarts, "restart_window_s": restart_window_s}
        super().__init__(make_simulator, validate({"env": values}).env, num_envs, n_action_steps, seed)


class GymVecEnv(SimulatorVecEnv):
    """N environments of gymnasium, in worker processes.

    `terminated` and `truncated` are gymnasium's, and the final observation of an episode is its true one. An episode is
    a success if `info` says so in its last env step; where `info` says nothing of success, `spec.has_success` is false
    and evaluations tell returns. For exact resuming the environment must draw everything from the generator that
    `reset(seed=...)` seeds, and no wrapper may carry anything from one episode into the next.
    """

    def __init__(  # noqa: PLR0913  what a user may want to say, each by its name
        self,
        make_env: str | Callable[[], gymnasium.Env[Any, Any]],
        num_envs: int = 16,
        n_action_steps: int = 4,
        *,
        num_workers: int | None = None,
        seed: int = 0,
        horizon: int | None = None,
        obs_keys: Sequence[str] | None = None,
        success_key: str | None = None,
        n_obs_steps: int = 1,
        step_timeout_s: float = 120.0,
        max_restarts: int = 10,
        restart_window_s: float = 600.0,
    ) -> None:
        """Make the environments and wait until all workers have.

        Args:
            make_env: An id, such as `"Pendulum-v1"`, or a function without arguments that returns an environment, with
                continuous actions (`Box`) and vectors (`Box`, or a `Dict` of them) as observations.
            num_envs: Environments, N.
            n_action_steps: Actions of a chunk, H, which must be the policy's; 1 decides in every env step.
            num_workers: Processes, of which at most N are used; None means one for each CPU core.
            seed: Environment i is first reset with `derive_seed(seed, "simulator", i)`, which tries it out.
            horizon: Env steps until an episode is truncated; None means the environment's own time limit.
            obs_keys: Which parts of a `Dict` observation make the `state`, in this order; None means all.
            success_key: Key of `info` that tells whether the task is solved; None looks for `is_success` and `success`.
            n_obs_steps: See `SimulatorVecEnv`, as for what follows.
            step_timeout_s: A worker that is silent for longer is replaced.
            max_restarts: Workers replaced within `restart_window_s`; one more is an `EnvError`.
            restart_window_s: Seconds over which `max_restarts` counts.

        Raises:
            EnvError: An environment could not be made.
            ConfigError: gymnasium is missing or has no such environment, or actions, observations or an argument cannot
                be used.
        """
        import_gymnasium()
        if isinstance(make_env, str):
            make_env = make_env.removeprefix(GYM)
        elif not callable(make_env):
            raise ConfigError(f"make_env = {make_env!r}: expected an id, or a function that returns one environment")
        task = f"{GYM}{make_env}" if isinstance(make_env, str) else ""
        make: Callable[[], Any] = (
            partial(make_registered, find_env(make_env)) if isinstance(make_env, str) else make_env
        )
        super().__init__(
            partial(GymSimulator, GymSettings(make, horizon, obs_keys, success_key, task)),
            num_envs,
            n_action_steps,
            num_workers=num_workers,
            seed=seed,
            n_obs_steps=n_obs_steps,
            step_timeout_s=step_timeout_s,
            max_restarts=max_restarts,
            restart_window_s=restart_window_s,
        )


def find_gym(config: EnvConfig) -> Recipe:
    """Return how the environments of `env.task=gym:ID` are built.

    Raises:
        ConfigError: As `GymVecEnv`; or the id names a module, which a policy file must not have imported.
    """
    name = config.task.removeprefix(GYM)
    if ":" in name:
        raise ConfigError(f"env.task = {config.task}: expected an id that an installed package registers, as it is")
    if choose_interpreter(config.python, "gym") is None:
        find_env(name)  # which refuses it before any process is started
    arguments = {"env_id": name, "horizon": config.horizon, "obs_keys": config.obs_keys, "task": config.task}
    simulator = "asyncflow.simulators.gym"
    return Recipe(f"{simulator}:build", arguments, f"{simulator}:import_gymnasium", "gym")


def find_named(config: EnvConfig) -> Recipe:
    """Return how simulators of `env.task=my_simulator:Reach`, a user's own, are built.

    Raises:
        ConfigError: A file names it and the user does not.
    """
    check_simulator(config.task)
    arguments = {"name": config.task, "horizon": config.horizon}
    return Recipe("asyncflow.simulators.named:build", arguments)
