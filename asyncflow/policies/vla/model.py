"""A small vision-language-action model: a prefix of pictures, instruction and state, and an expert that denoises.

How its velocity becomes a policy is in `policies/velocity.py`. The backbone encodes the prefix once; the expert turns
it into keys and values once, and attends to them in every denoising step, as pi0 (arXiv:2410.24164) and GR00T N1
(arXiv:2503.14734) do.

Shapes: N decisions, C cameras, S tokens of the prefix, W backbone's width, E expert's width, J denoising steps
evaluated at once, P predicted actions, A action size, D state size, G attention heads, F = E / G.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from asyncflow.config.observations import TASK
from asyncflow.errors import ConfigError
from asyncflow.policies.networks.layers import NUM_TIME_FEATURES, Normalizer, mlp, time_features

MAX_INSTRUCTION = 128  # tokens; the longest instruction has one byte less
VOCABULARY = 257
END = 256


class Size(NamedTuple):
    """Width, layers and attention heads of the backbone and of the expert."""

    width: int
    depth: int
    heads: int
    expert_width: int
    expert_depth: int
    expert_heads: int


SIZES = {"tiny": Size(64, 2, 4, 64, 2, 4), "base": Size(1024, 24, 16, 1024, 12, 16)}
KeysValues = list[tuple[Tensor, Tensor]]


class VLAShape(NamedTuple):
    """Sizes that a model must fit: camera -> (3, h, w), (D,), P, A, tokens of instructions, a patch's side in pixels.

    A history of observations has O in front of both shapes: (O, 3, h, w) and (O, D). The tokens are `[K, L]`, a row for
    each of K tasks, of which an observation's `task` is one; a single row serves all observations.
    """

    image_shapes: Mapping[str, tuple[int, ...]]
    state_shape: tuple[int, ...]
    horizon: int
    action_dim: int
    instructions: Tensor
    patch_size: int


def tokenize(texts: Sequence[str]) -> Tensor:
    """Return each instruction's UTF-8 bytes and an end token, `[K, L]` int64; shorter ones have more of the latter.

    Raises:
        ConfigError: One is longer than 127 bytes.
    """
    rows = [[*text.encode(), END] for text in texts]
    length = max(map(len, rows))
    if length > MAX_INSTRUCTION:
        text = next(text for text, row in zip(texts, rows, strict=True) if len(row) == length)
        raise ConfigError(
            f"policy.vla.instruction = {text!r} is {length - 1} bytes long, at most {MAX_INSTRUCTION - 1} are read"
        )
    return torch.tensor([row + [END] * (length - len(row)) for row in rows])


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be computed ahead."""

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(context_width or width, 2 * width)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of `[N, S, W]`, each `[N, G, S, F]`."""
        keys, values = self.key_value(context).chunk(2, -1)
        return self._split(keys), self._split(values)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        """Return what the tokens `[N, L, E]` see in keys and values, `[N, L, E]`."""
        seen = scaled_dot_product_attention(self._split(self.query(x)), *cache)
        result: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return result

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads.transpose(1, 2)


class SelfAttention(nn.Module):
    """Pre-normalised residual attention of tokens to each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., L, E]`."""
        tokens = self.norm(x).flatten(0, -3)
        seen: Tensor = self.attention(tokens, self.attention.keys_values(tokens))
        return x + seen.view(x.shape)


class FeedForward(nn.Module):
    """Pre-normalised residual MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., E]`."""
        change: Tensor = self.layers(x)
        return x + change


class Backbone(nn.Module):
    """Pictures, instruction and state -> features of the prefix; every token sees every other."""

    instructions: Tensor

    def __init__(self, size: Size, shape: VLAShape) -> None:
        super().__init__()
        self.cameras = sorted(shape.image_shapes)
        self.patches = nn.Conv2d(3, size.width, shape.patch_size, shape.patch_size) if self.cameras else None
        counts = [_count_patches(camera, shape) for camera in self.cameras]
        self.places = nn.ParameterList(nn.Parameter(0.02 * torch.randn(count, size.width)) for count in counts)
        self.words = nn.Embedding(VOCABULARY, size.width)
        self.word_places = nn.Parameter(0.02 * torch.randn(MAX_INSTRUCTION, size.width))
        self.state = nn.Linear(math.prod(shape.state_shape), size.width)
        layers = [(SelfAttention(size.width, size.heads), FeedForward(size.width)) for _ in range(size.depth)]
        self.layers = nn.Sequential(*(part for pair in layers for part in pair), nn.LayerNorm(size.width))
        # Not saved: a checkpoint serves other instructions too.
        self.register_buffer("instructions", shape.instructions, persistent=False)

    def forward(self, images: Mapping[str, Tensor], state: Tensor, task: Tensor | None) -> Tensor:
        """Return features `[N, S, W]` of pictures `[N, 3, h, w]` uint8 by camera and normalised states `[N, D]`.

        Either may be a history: `[N, O, 3, h, w]`, `[N, O, D]`. `task` `[N]` is the instruction's row; None: the first.
        """
        tokens = [self._see(images[camera]) + self.places[i] for i, camera in enumerate(self.cameras)]
        words = self.words(self.instructions) + self.word_places[: self.instructions.shape[1]]
        words = words.expand(len(state), -1, -1) if task is None else words[task]
        tokens += [words, self.state(state.flatten(1))[:, None]]
        features: Tensor = self.layers(torch.cat(tokens, 1))
        return features

    def _see(self, image: Tensor) -> Tensor:
        """Return a token per patch of every picture, `[N, L, W]`."""
        assert self.patches is not None  # there are cameras
        scaled = image.flatten(0, -4).to(self.patches.weight.dtype) / 127.5 - 1
        tokens: Tensor = self.patches(scaled)
        return tokens.flatten(2).transpose(1, 2).reshape(len(image), -1, tokens.shape[1])


class ExpertLayer(nn.Module):
    """Tokens of a chunk attend to each other, then to the prefix."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, heads = size.expert_width, size.expert_heads
        self.among = SelfAttention(width, heads)
        self.norm, self.prefix = nn.LayerNorm(width), Attention(width, heads, size.width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        """Return `[N, J, P, E]`; all J steps query one cache, which is not repeated for them."""
        x = self.among(x)
        seen = self.prefix(self.norm(x).flatten(1, 2), cache)
        result: Tensor = self.feed_forward(x + seen.view(x.shape))
        return result


class VLAModel(nn.Module):
    """A velocity field and a value over the features of a prefix.

    Attributes:
        backbone: All of what `encode_prefix` runs.
        value_head: All of what `value` runs.
    """

    def __init__(self, size: Size, shape: VLAShape, value_sizes: list[int]) -> None:
        """Build the networks; `value_sizes` are the hidden layers of the value head.

        Raises:
            ConfigError: A picture is no multiple of the patch.
        """
        super().__init__()
        self.obs_normalizer = Normalizer(shape.state_shape[-1:])
        self.backbone = Backbone(size, shape)
        width = size.expert_width
        self.action_in = nn.Linear(shape.action_dim, width)
        self.action_places = nn.Parameter(0.02 * torch.randn(shape.horizon, width))
        self.time_in = mlp([NUM_TIME_FEATURES, width, width])
        self.layers = nn.ModuleList(ExpertLayer(size) for _ in range(size.expert_depth))
        self.action_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, shape.action_dim))
        self.value_head = ValueHead(size.width, value_sizes)

    def encode_prefix(self, obs: TensorDictBase) -> Tensor:
        """Return the features of observations, `[N, S, W]`."""
        images = obs["images"] if self.backbone.cameras else {}
        task = obs[TASK] if len(self.backbone.instructions) > 1 else None
        features: Tensor = self.backbone(images, self.obs_normalizer.normalize(obs["state"]), task)
        return features

    def cache_prefix(self, prefix: Tensor) -> KeysValues:
        """Return each expert layer's keys and values of features `[N, S, W]`."""
        return [layer.prefix.keys_values(prefix) for layer in self.layers]  # type: ignore[union-attr, operator]

    def velocity(self, cache: KeysValues, x: Tensor, time: Tensor) -> Tensor:
        """Return the velocity `[N, J, P, A]` of `x [N, J, P, A]` at `time [N, J]`."""
        tokens = self.action_in(x) + self.action_places + self.time_in(time_features(time))[..., None, :]
        for layer, keys_values in zip(self.layers, cache, strict=True):
            tokens = layer(tokens, keys_values)
        velocity: Tensor = self.action_out(tokens)
        return velocity

    def value(self, prefix: Tensor) -> Tensor:
        """Return V `[N]` of features `[N, S, W]`."""
        value: Tensor = self.value_head(prefix)
        return value


class ValueHead(nn.Module):
    """Pools the prefix by learned weights, then an MLP, which may see `num_others` numbers besides."""

    def __init__(self, width: int, hidden_sizes: list[int], num_others: int = 0) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)
        self.mlp = mlp([width + num_others, *hidden_sizes, 1], output_gain=0.01)

    def forward(self, features: Tensor, others: Tensor | None = None, is_token: Tensor | None = None) -> Tensor:
        """Return `[N]` of features `[N, S, W]`, but those that `is_token [N, S]` leaves out, and `[N, num_others]`."""
        score = self.score(features)
        if is_token is not None:
            score = score.masked_fill(~is_token[..., None], -torch.inf)
        pooled = (score.softmax(1) * features).sum(1)
        value: Tensor = self.mlp(pooled if others is None else torch.cat([pooled, others], -1))
        return value.squeeze(-1)


def _count_patches(camera: str, shape: VLAShape) -> int:
    *history, _, height, width = shape.image_shapes[camera]
    if height % shape.patch_size or width % shape.patch_size:
        raise ConfigError(
            f"policy.vla.patch_size = {shape.patch_size} must divide the {height} x {width} pictures of camera {camera}"
        )
    return math.prod(history) * (height // shape.patch_size) * (width // shape.patch_size)
