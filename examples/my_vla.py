"""A model of your own with a velocity field: a picture and a state in, a velocity and a value out.

    PYTHONPATH=examples asyncflow train --config toy_vla_tiny policy.vla.model_class=my_vla.MyVLA \
        policy.vla.model_config="{width: 64, horizon: 2, action_dim: 2}"

Shapes: N decisions, J denoising steps evaluated at once, P predicted actions, A action size, W width.
"""

import torch
from tensordict import TensorDict
from torch import Tensor, nn


class Eyes(nn.Module):
    """The part that `policy.freeze_backbone=true` freezes: everything that `encode_prefix` runs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.see = nn.Sequential(nn.Conv2d(3, 8, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(width))
        self.feel = nn.Linear(4, width)
        self(torch.zeros(1, 3, 28, 28), torch.zeros(1, 4))  # sets the lazy layer's size

    def forward(self, picture: Tensor, state: Tensor) -> Tensor:
        """Return features, [N, W]."""
        return torch.cat([self.see(picture), self.feel(state)], 1).relu()


class MyVLA(nn.Module):
    """Three methods make a policy: `encode_prefix`, `velocity`, `value`."""

    def __init__(self, width: int, horizon: int, action_dim: int) -> None:
        super().__init__()
        self.backbone = Eyes(width)
        self.expert = nn.Sequential(
            nn.Linear(2 * width + horizon * action_dim + 1, width), nn.ReLU(), nn.Linear(width, horizon * action_dim)
        )
        self.value_head = nn.Linear(2 * width, 1)  # trained by critic_learning_rate

    def encode_prefix(self, obs: TensorDict) -> Tensor:
        """Return what all denoising steps share, one tensor [N, ...]; called once a decision."""
        picture = obs["images", "top"].float() / 127.5 - 1
        return self.backbone(picture, obs["state"])

    def velocity(self, prefix: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Return noise - action, [N, J, P, A], of noisy chunks `x` [N, J, P, A] at `time` [N, J], from 1 down to 0."""
        seen = prefix[:, None].expand(-1, x.shape[1], -1)
        return self.expert(torch.cat([seen, x.flatten(2), time[..., None]], -1)).view(x.shape)

    def value(self, prefix: Tensor) -> Tensor:
        """Return V, [N]; no gradient flows from here into the prefix."""
        return self.value_head(prefix).squeeze(-1)
