"""An advantage estimator of your own: the return of a decision compared with the other environments', not with V.

As an argument, in a program:

    PPO(policy, advantage=MeanOfTheOthers(gae_lambda=0.9))

By name, from the command line (`asyncflow train algorithm.advantage=mean_of_the_others`), once the package that holds
this file declares it in its `pyproject.toml`:

    [project.entry-points."asyncflow.advantages"]
    mean_of_the_others = "my_advantage:from_config"

Shapes: T decisions, N environments.
"""

from torch import Tensor

from asyncflow.config.sections import AlgorithmConfig
from asyncflow.ppo.gae import Transitions, compute_gae


class MeanOfTheOthers:
    """Leave-one-out baseline: what the other environments earned from the same step on."""

    def __init__(self, gae_lambda: float) -> None:
        self.gae_lambda = gae_lambda

    def __call__(self, transitions: Transitions) -> tuple[Tensor, Tensor]:
        """Return advantages and returns, both [T, N]; the critic is still trained towards the returns."""
        _, returns = compute_gae(transitions, self.gae_lambda)
        num_envs = returns.shape[1]
        others = (returns.sum(1, keepdim=True) - returns) / max(1, num_envs - 1)
        return returns - others, returns


def from_config(config: AlgorithmConfig) -> MeanOfTheOthers:
    """Return the estimator; asyncflow calls this with the run's `algorithm` section."""
    return MeanOfTheOthers(config.gae_lambda)
