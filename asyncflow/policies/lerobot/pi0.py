"""pi0 (arXiv:2410.24164) as LeRobot has it, with the methods of a velocity field.

This file asks LeRobot's model for what `VLAPolicy` needs. It loads LeRobot, an optional extra.

Pictures are embedded by LeRobot's own code. The layers of PaliGemma and of the expert are LeRobot's modules too, but
are called here: LeRobot's code rounds to bfloat16 wherever it calls them, whatever type they have. Padding is left out
of the prefix before it is encoded, so that every token sees every other. The state is the expert's: a token that sees
the prefix, and that all actions see. It does not depend on the time, so that it runs once a decision.

Shapes: N decisions, S tokens of the prefix, T tokens of any kind, W width of PaliGemma, L layers, H attention heads, G
of them for keys and values, F size of a head, E width of PaliGemma or of the expert, D state size, J denoising steps
evaluated at once, P predicted actions, M action size with the model's padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lerobot.constants import OBS_STATE
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from lerobot.policies.pi0.paligemma_with_expert import apply_rope
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoTokenizer

from asyncflow.config.lerobot_folder import LeRobotFolder
from asyncflow.config.sections import PolicyConfig
from asyncflow.errors import CheckpointError
from asyncflow.policies.lerobot.model import LeRobotModel, SeenPrefix, one_line, rows_of
from asyncflow.policies.vla.model import KeysValues, ValueHead

TOKENIZER = "google/paligemma-3b-pt-224"  # LeRobot's code names it, no folder does
PERIODS = (4e-3, 4.0)  # these, too


class Pi0(LeRobotModel):
    """LeRobot's pi0 with the methods of a velocity field, and a value head on prefix and state.

    Attributes:
        value_head: Sees PaliGemma's last features and the normalised state.
    """

    words: Tensor
    is_word: Tensor | None
    lerobot_class = PI0Policy

    def __init__(
        self, folder: LeRobotFolder, cameras: Mapping[str, str], config: PolicyConfig, instructions: Sequence[str]
    ) -> None:
        """Read a folder; see `LeRobotModel` and `build_lerobot`. `config` gives the value head's size.

        Raises:
            CheckpointError: Its model cannot be built, its tensors do not fit it, or there is no tokenizer.
        """
        check_tokenizer(folder)
        super().__init__(folder, cameras)
        self.width: int = self.text_config.hidden_size
        self.value_head = ValueHead(self.width, config.critic_hidden_sizes, folder.state_dim)
        words, is_word = self.read_instructions(instructions)
        words, is_word = words[:, is_word.any(0)], is_word[:, is_word.any(0)]
        self.register_buffer("words", words, persistent=False)  # a checkpoint serves others too
        self.register_buffer("is_word", None if bool(is_word.all()) else is_word, persistent=False)
        # No word is predicted. PaliGemma's head is its table of words again, which LeRobot restores from either.
        self.backbone.lm_head = None
        self._with_expert.gemma_expert.lm_head.requires_grad_(False)

    @property
    def _with_expert(self) -> Any:
        return self.flow.paligemma_with_expert

    @property
    def backbone(self) -> Any:
        """All of what `encode_prefix` runs: PaliGemma."""
        return self._with_expert.paligemma

    @property
    def text_config(self) -> Any:
        """The sizes of the language model; those of the expert's heads are the same."""
        return self._with_expert.config.paligemma_config.text_config

    @property
    def _expert(self) -> Any:
        return self._with_expert.gemma_expert.model

    def _rename(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed: dict[str, Tensor] = PI0Policy._transform_state_dict_keys(stored)
        return renamed

    def _execution_settings(self, n_action_steps: int) -> dict[str, Any]:
        """Return nothing: pi0's `n_action_steps` is what it predicts, all of which LeRobot executes."""
        return {}

    def encode_prefix(self, obs: TensorDictBase) -> TensorDict:
        """Return what the expert and the value see of observations.

        `features [N, S, 2 L G F + W]`: for every token the keys and values of each layer, then its last features;
        `state [N, D]`, normalised; where the instructions of several tasks differ in length `is_token [N, S]`, which
        leaves padding out.
        """
        batch, language = self.normalize_obs(obs), self.backbone.language_model
        tokens = self._embed_prefix(batch, rows_of(self.words, obs))
        place, mask, padding = torch.arange(tokens.shape[1], device=tokens.device)[None], None, {}
        if self.is_word is not None:
            is_word = rows_of(self.is_word, obs)
            is_patch = is_word.new_ones(len(obs), tokens.shape[1] - is_word.shape[1])
            padding = {"is_token": torch.cat([is_patch, is_word], 1)}
            place, mask = padding["is_token"].cumsum(1) - 1, padding["is_token"][:, None, None]
        tokens, cache = self._run(language.layers, tokens, place, is_seen=mask)
        seen = [part.flatten(2) for keys_values in cache for part in keys_values]
        features = torch.cat([*seen, language.norm(tokens)], -1)
        return TensorDict({"features": features, "state": batch[OBS_STATE], **padding}, batch_size=obs.batch_size)

    def _embed_prefix(self, batch: dict[str, Tensor], words: Tensor) -> Tensor:
        """Return a token per patch of the pictures and per word `[N, words]`, `[N, S, W]`."""
        pictures, _ = self.lerobot.prepare_images(batch)
        pictures = pictures[: len(self.cameras)]  # after which come the folder's empty cameras, which nothing sees
        seen = [self._with_expert.embed_image(picture) for picture in pictures]
        embedded = self.backbone.language_model.embed_tokens(words)
        tokens: Tensor = torch.cat([*seen, embedded], 1) * self.width**0.5
        return tokens

    def cache_prefix(self, prefix: TensorDictBase) -> SeenPrefix:
        """Return keys and values `[N, S + 1, G, F]` of prefix and state for each layer of the expert."""
        shape = (len(self._expert.layers), 2, self.text_config.num_key_value_heads, self.text_config.head_dim)
        parts = prefix["features"][..., : -self.width].unflatten(-1, shape)
        is_token = prefix.get("is_token", None)
        seen = SeenPrefix([(layer[:, :, 0], layer[:, :, 1]) for layer in parts.unbind(2)], parts.shape[1], is_token)
        state = self.flow.state_proj(self.lerobot.prepare_state({OBS_STATE: prefix["state"]}))
        place, mask = torch.zeros(1, 1, dtype=torch.int64, device=parts.device) + seen.end(), None
        if is_token is not None:
            is_token = nn.functional.pad(is_token, (0, 1), value=True)
            mask = is_token[:, None, None]
        _, own = self._run(self._expert.layers, state[:, None], place, seen.layers, mask)
        joined = [_join(*pair) for pair in zip(seen.layers, own, strict=True)]
        return SeenPrefix(joined, seen.num_tokens + 1, is_token)

    def velocity(self, cache: SeenPrefix, x: Tensor, time: Tensor) -> Tensor:
        """Return the velocity `[N, J, P, M]` of `x [N, J, P, M]` at `time [N, J]`, from 1 (noise) to 0 (action).

        All actions of a chunk see each other, so that P is what the model was trained with.
        """
        tokens = self.embed_actions(x, time, PERIODS).flatten(1, 2)
        place = torch.arange(tokens.shape[1], device=x.device)
        chunk, step = place // x.shape[2], (place % x.shape[2])[None]
        is_seen = cache.mask_with(chunk[:, None] == chunk)
        tokens, _ = self._run(self._expert.layers, tokens, cache.end() + step, cache.layers, is_seen)
        velocity: Tensor = self.flow.action_out_proj(self._expert.norm(tokens).float())
        return velocity.view(x.shape)

    def _run(
        self, layers: Any, tokens: Tensor, place: Tensor, cache: KeysValues | None = None, is_seen: Tensor | None = None
    ) -> tuple[Tensor, KeysValues]:
        """Return what layers make of tokens `[N, T, E]`, and their own keys and values `[N, T, G, F]`.

        The places are `[N, T]`, or `[1, T]`. The tokens see what `cache` holds for each layer, and themselves;
        `is_seen` says which token sees which of both.
        """
        own = []
        for number, layer in enumerate(layers):
            attention, normed = layer.self_attn, layer.input_layernorm(tokens)
            query, keys = (
                apply_rope(self.split_heads(project(normed)), place) for project in (attention.q_proj, attention.k_proj)
            )
            own.append((keys, self.split_heads(attention.v_proj(normed))))
            seen = own[-1] if cache is None else _join(cache[number], own[-1])
            seen_keys, values = (self.spread_heads(part) for part in seen)
            attended = scaled_dot_product_attention(query.transpose(1, 2), seen_keys, values, attn_mask=is_seen)
            tokens = tokens + attention.o_proj(attended.transpose(1, 2).flatten(2))
            tokens = tokens + layer.mlp(layer.post_attention_layernorm(tokens))
        return tokens, own

    def value(self, prefix: TensorDictBase) -> Tensor:
        """Return V `[N]` of a prefix."""
        is_token = prefix.get("is_token", None)
        value: Tensor = self.value_head(prefix["features"][..., -self.width :], prefix["state"], is_token)
        return value


def _join(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return keys and values of the tokens of both."""
    return torch.cat([first[0], second[0]], 1), torch.cat([first[1], second[1]], 1)


def check_tokenizer(folder: LeRobotFolder) -> None:
    """Refuse before the model is built, which takes long, what cannot read an instruction.

    Raises:
        CheckpointError: The tokenizer cannot be loaded.
    """
    try:
        AutoTokenizer.from_pretrained(TOKENIZER)
    except Exception as error:  # transformers, tokenizers and the hub have errors of their own
        raise CheckpointError(
            f"policy.checkpoint = {folder.path}: pi0 needs the tokenizer {TOKENIZER}, which is not in the cache of "
            f"Hugging Face and cannot be downloaded: {one_line(error)}"
        ) from error
