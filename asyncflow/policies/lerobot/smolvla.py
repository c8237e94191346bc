"""SmolVLA (arXiv:2506.01844) as LeRobot has it, with the methods of a velocity field.

This file asks LeRobot's model for what `VLAPolicy` needs. It loads LeRobot, an optional extra.

The prefix runs by LeRobot's own code, once a decision. The expert's layers are LeRobot's modules too, but are called
here: for J denoising steps at once, on keys and values of the prefix that were computed once.

Shapes: N decisions, S tokens of the prefix without padding, W width of the vision-language model, L layers of the
expert, H attention heads, G of them for keys and values, F size of a head, E width of the expert, J denoising steps
evaluated at once, P predicted actions, A action size, M action size with the model's padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, make_att_2d_masks, standardise_state_dict
from lerobot.policies.smolvla.smolvlm_with_expert import apply_rope
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from asyncflow.config.lerobot_folder import LeRobotFolder
from asyncflow.config.observations import Shapes
from asyncflow.config.sections import PolicyConfig
from asyncflow.policies.lerobot.model import LeRobotModel, SeenPrefix, rows_of
from asyncflow.policies.vla.model import ValueHead


class ExpertLayer(NamedTuple):
    """One layer of the expert, and the layer of the vision-language model whose keys and values it sees.

    Attributes:
        number: Which layer of the vision-language model that is.
        modules: LeRobot's layer.
        is_cross: Whether its tokens see the prefix alone, by keys and values of the expert's own; otherwise they also
            see the actions before them.
    """

    number: int
    modules: Any
    is_cross: bool


class SmolVLA(LeRobotModel):
    """LeRobot's SmolVLA with the methods of a velocity field, and a value head on the prefix.

    Attributes:
        value_head: Sees the vision-language model's last features.
    """

    words: Tensor
    is_word: Tensor
    kept: Tensor | None
    is_token: Tensor | None
    lerobot_class = SmolVLAPolicy
    overrides = {"load_vlm_weights": False}  # noqa: RUF012  those of the folder take their place

    def __init__(
        self, folder: LeRobotFolder, cameras: Mapping[str, str], config: PolicyConfig, instructions: Sequence[str]
    ) -> None:
        """Read a folder; see `LeRobotModel` and `build_lerobot`. `config` gives the value head's size.

        Raises:
            CheckpointError: Its model cannot be built, or its tensors do not fit it.
        """
        super().__init__(folder, cameras)
        self.width: int = self.text_config.hidden_size
        self.value_head = ValueHead(self.width, config.critic_hidden_sizes)
        words, is_word = self.read_instructions(instructions)
        self.register_buffer("words", words, persistent=False)  # a checkpoint serves other instructions too
        self.register_buffer("is_word", is_word, persistent=False)
        self.register_buffer("kept", None, persistent=False)  # tokens of the prefix that are no padding in every task
        self.register_buffer("is_token", None, persistent=False)  # [K, S] of them those that are none in each
        self._with_expert.processor = None  # as the tokenizer

    @property
    def _with_expert(self) -> Any:
        return self.flow.vlm_with_expert

    @property
    def text_config(self) -> Any:
        """The sizes of the language model."""
        return self._with_expert.config.text_config

    @property
    def backbone(self) -> nn.ModuleDict:
        """All of what `encode_prefix` runs; a view, so that the state dict keeps LeRobot's names."""
        return nn.ModuleDict({"vlm": self._with_expert.vlm, "state": self.flow.state_proj})

    def _rename(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed: dict[str, Tensor] = standardise_state_dict(stored, set(self.lerobot.state_dict()), verbose=False)[0]
        return renamed

    def look_at_black(self, image_shapes: Shapes) -> None:
        """Denoise a step on black pictures; it also shows which tokens of every prefix are padding.

        Raises:
            Exception: Whatever the model's code fails with.
        """
        with torch.no_grad():
            _, is_token, _ = self._embed_prefix(self.black_obs(image_shapes, len(self.words)))
        if not bool(is_token.all()):
            self.kept = is_token.any(0).nonzero().squeeze(1)
            is_token = is_token.index_select(1, self.kept)
            self.is_token = None if bool(is_token.all()) else is_token
        super().look_at_black(image_shapes)

    def _embed_prefix(self, obs: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """Return LeRobot's tokens of the prefix, which of them are no padding, and where a causal block begins."""
        batch = self.normalize_obs(obs)
        pictures, is_picture = self.lerobot.prepare_images(batch)
        words, is_word = rows_of(self.words, obs), rows_of(self.is_word, obs)
        embedded: tuple[Tensor, Tensor, Tensor] = self.flow.embed_prefix(
            pictures, is_picture, words, is_word, state=self.lerobot.prepare_state(batch)
        )
        return embedded

    def encode_prefix(self, obs: TensorDictBase) -> Tensor | TensorDict:
        """Return what the expert and the value see of observations, `[N, S, 2 L G F + W]`.

        For every token the keys and values of each layer that the expert attends to, then its last features. Where the
        instructions of several tasks differ in length, that is `features`, and `is_token [N, S]` leaves padding out.
        """
        tokens, is_token, is_causal = self._embed_prefix(obs)
        (features, _), cache = self._with_expert.forward(
            attention_mask=make_att_2d_masks(is_token, is_causal),
            position_ids=is_token.cumsum(1) - 1,
            past_key_values=None,
            inputs_embeds=[tokens, None],
            use_cache=True,
            fill_kv_cache=True,
        )
        seen = [cache[layer.number][part] for layer in self._layers() for part in ("key_states", "value_states")]
        prefix = torch.cat([*(part.flatten(2) for part in seen), features], -1)
        prefix = prefix if self.kept is None else prefix.index_select(1, self.kept)
        if self.is_token is None:
            return prefix
        return TensorDict({"features": prefix, "is_token": rows_of(self.is_token, obs)}, batch_size=obs.batch_size)

    def cache_prefix(self, prefix: Tensor | TensorDictBase) -> SeenPrefix:
        """Return keys and values `[N, H, S, F]` of a prefix for each layer of the expert."""
        text, layers, (features, is_token) = self.text_config, self._layers(), _split(prefix)
        shape = (len(layers), 2, text.num_key_value_heads, text.head_dim)
        parts = features[..., : -self.width].unflatten(-1, shape).unbind(2)
        seen = [self._keys_values(layer, *part.unbind(2)) for layer, part in zip(layers, parts, strict=True)]
        return SeenPrefix(seen, features.shape[1], is_token)

    def _keys_values(self, layer: ExpertLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer.is_cross:
            attention = layer.modules.self_attn
            keys, values = attention.k_proj(keys.flatten(2)), attention.v_proj(values.flatten(2))
            keys, values = self.split_heads(keys), self.split_heads(values)
        return self.spread_heads(keys), self.spread_heads(values)

    def velocity(self, cache: SeenPrefix, x: Tensor, time: Tensor) -> Tensor:
        """Return the velocity `[N, J, P, M]` of `x [N, J, P, M]` at `time [N, J]`, from 1 (noise) to 0 (action).

        An action sees those before it alone, so that the first P of a chunk do not depend on the rest of it.
        """
        config = self.lerobot.config
        tokens = self.embed_actions(x, time, (config.min_period, config.max_period)).flatten(1, 2)
        place = torch.arange(x.shape[1] * x.shape[2], device=x.device)
        chunk, step = place // x.shape[2], (place % x.shape[2])[None]
        is_before = (chunk[:, None] == chunk) & (place[:, None] >= place)
        place, masks = step + cache.end(), (cache.mask_with(is_before), cache.mask())
        for layer, keys_values in zip(self._layers(), cache.layers, strict=True):
            seen = (step, masks[1]) if layer.is_cross else (place, masks[0])
            tokens = tokens + self._attend(layer, tokens, keys_values, *seen)
            tokens = tokens + layer.modules.mlp(layer.modules.post_attention_layernorm(tokens))
        velocity: Tensor = self.flow.action_out_proj(self._with_expert.lm_expert.norm(tokens).float())
        return velocity.view(x.shape)

    def _attend(
        self,
        layer: ExpertLayer,
        tokens: Tensor,
        keys_values: tuple[Tensor, Tensor],
        place: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Return what the tokens `[N, J P, E]` of J chunks see; all chunks query one cache, which is not repeated."""
        attention, (keys, values) = layer.modules.self_attn, keys_values
        normed = layer.modules.input_layernorm(tokens)
        query = apply_rope(self.split_heads(attention.q_proj(normed)), place).transpose(1, 2)
        if not layer.is_cross:
            own = (
                apply_rope(self.split_heads(attention.k_proj(normed)), place),
                self.split_heads(attention.v_proj(normed)),
            )
            keys, values = (torch.cat([x, self.spread_heads(y)], 2) for x, y in zip(keys_values, own, strict=True))
        seen = scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        result: Tensor = attention.o_proj(seen.transpose(1, 2).flatten(2))
        return result

    def _layers(self) -> list[ExpertLayer]:
        model = self._with_expert
        every, has_cross = model.self_attn_every_n_layers, "cross" in model.attention_mode
        _, layers = model.get_model_layers([model.get_vlm_model().text_model, model.lm_expert])
        return [
            ExpertLayer(number, modules, has_cross and not (every > 0 and number % every == 0))
            for number, modules in enumerate(layers)
            if modules is not None
        ]

    def value(self, prefix: Tensor | TensorDictBase) -> Tensor:
        """Return V `[N]` of a prefix."""
        features, is_token = _split(prefix)
        value: Tensor = self.value_head(features[..., -self.width :], is_token=is_token)
        return value


def _split(prefix: Tensor | TensorDictBase) -> tuple[Tensor, Tensor | None]:
    """Return a prefix's features, and which of its tokens are no padding; None where all are."""
    return (prefix, None) if isinstance(prefix, Tensor) else (prefix["features"], prefix["is_token"])
