"""SmolVLA (arXiv:2506.01844) as LeRobot has it, with the methods of a velocity field.

Owns how LeRobot's model is asked for what `VLAPolicy` needs, and how its folder is read and written. It must not know
how a policy is trained. It loads LeRobot, an optional extra.

The prefix runs by LeRobot's own code, once a decision. The expert's layers are LeRobot's modules too, but are called
here: for J denoising steps at once, on keys and values of the prefix that were computed once.

Shapes: N decisions, S tokens of the prefix without padding, W width of the vision-language model, L layers of the
expert, H attention heads, G of them for keys and values, F size of a head, E width of the expert, J denoising steps
evaluated at once, P predicted actions, A action size, M action size with the model's padding.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.constants import OBS_STATE
from lerobot.policies.smolvla.modeling_smolvla import (
    SmolVLAPolicy,
    create_sinusoidal_pos_embedding,
    make_att_2d_masks,
    standardise_state_dict,
)
from lerobot.policies.smolvla.smolvlm_with_expert import apply_rope
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from asyncflow.config import PolicyConfig
from asyncflow.errors import CheckpointError
from asyncflow.lerobot_folder import CONFIG, WEIGHTS, LeRobotFolder
from asyncflow.policies.image_encoder import Shapes
from asyncflow.policies.vla_model import KeysValues, ValueHead
from asyncflow.policy_file import check_tensors, write_atomically


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


class SmolVLA(nn.Module):
    """LeRobot's SmolVLA with the methods of a velocity field, and a value head on the prefix.

    Attributes:
        lerobot: LeRobot's policy; its state dict is that of the folder.
        padded_action_dim: M.
        value_head: Sees the vision-language model's last features.
    """

    words: Tensor
    is_word: Tensor
    kept: Tensor | None

    def __init__(self, folder: LeRobotFolder, cameras: Mapping[str, str], config: PolicyConfig) -> None:
        """Read a folder.

        Args:
            folder: What to read.
            cameras: LeRobot's name of a picture -> its name in an observation.
            config: Gives the instruction and the value head's size.

        Raises:
            CheckpointError: Its model cannot be built, or its tensors do not fit it.
        """
        super().__init__()
        self.lerobot: Any = build_model(folder)
        self.file_types = load_weights(self.lerobot, folder)
        self.settings: dict[str, Any] = json.loads((folder.path / CONFIG).read_text(encoding="utf-8"))
        self.cameras = dict(cameras)
        self.padded_action_dim: int = self.lerobot.config.max_action_dim
        self.width: int = self._with_expert.config.text_config.hidden_size
        self.value_head = ValueHead(self.width, config.critic_hidden_sizes)
        example = {OBS_STATE: torch.zeros(1, folder.state_dim), "task": config.instruction}
        words, is_word = self.lerobot.prepare_language(example)
        self.register_buffer("words", words, persistent=False)  # a checkpoint serves another instruction too
        self.register_buffer("is_word", is_word, persistent=False)
        self.register_buffer("kept", None, persistent=False)
        # The words are known: what made them need not be copied for the collector.
        self.lerobot.language_tokenizer = self._with_expert.processor = None

    @property
    def _flow(self) -> Any:
        return self.lerobot.model

    @property
    def _with_expert(self) -> Any:
        return self._flow.vlm_with_expert

    @property
    def backbone(self) -> nn.ModuleDict:
        """All of what `encode_prefix` runs; a view, so that the state dict keeps LeRobot's names."""
        return nn.ModuleDict({"vlm": self._with_expert.vlm, "state": self._flow.state_proj})

    def look_at_black(self, image_shapes: Shapes) -> None:
        """Denoise a step on black pictures: it shows that the model runs, and which tokens of every prefix are padding.

        Raises:
            Exception: Whatever the model's code fails with.
        """
        black = {camera: torch.zeros(1, *image_shapes[camera], dtype=torch.uint8) for camera in self.cameras.values()}
        state = torch.zeros(1, self.lerobot.config.robot_state_feature.shape[0])
        with torch.no_grad():
            _, is_token, _ = self._embed_prefix(black, state)
            if not bool(is_token.all()):
                self.kept = is_token[0].nonzero().squeeze(1)
            obs = TensorDict({"images": TensorDict(black, [1]), "state": state}, [1])
            chunk, time = torch.zeros(1, 1, 1, self.padded_action_dim), torch.ones(1, 1)
            self.velocity(self.cache_prefix(self.encode_prefix(obs)), chunk, time)

    def _embed_prefix(self, images: Mapping[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return LeRobot's tokens of the prefix, which of them are no padding, and where a causal block begins."""
        batch = {name: images[camera].float() / 255 for name, camera in self.cameras.items()}
        batch = self.lerobot.normalize_inputs(batch | {OBS_STATE: state})
        pictures, is_picture = self.lerobot.prepare_images(batch)
        words, is_word = (x.expand(len(state), -1) for x in (self.words, self.is_word))
        embedded: tuple[Tensor, Tensor, Tensor] = self._flow.embed_prefix(
            pictures, is_picture, words, is_word, state=self.lerobot.prepare_state(batch)
        )
        return embedded

    def encode_prefix(self, obs: TensorDictBase) -> Tensor:
        """Return what the expert and the value see of observations, `[N, S, 2 L G F + W]`.

        For every token the keys and values of each layer that the expert attends to, then its last features.
        """
        tokens, is_token, is_causal = self._embed_prefix(obs["images"], obs["state"])
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
        return prefix if self.kept is None else prefix.index_select(1, self.kept)

    def cache_prefix(self, prefix: Tensor) -> KeysValues:
        """Return keys and values `[N, H, S, F]` of a prefix for each layer of the expert."""
        text, layers = self._with_expert.config.text_config, self._layers()
        shape = (len(layers), 2, text.num_key_value_heads, text.head_dim)
        parts = prefix[..., : -self.width].unflatten(-1, shape).unbind(2)
        return [self._keys_values(layer, *part.unbind(2)) for layer, part in zip(layers, parts, strict=True)]

    def _keys_values(self, layer: ExpertLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer.is_cross:
            attention = layer.modules.self_attn
            keys, values = attention.k_proj(keys.flatten(2)), attention.v_proj(values.flatten(2))
            keys, values = self._split(keys), self._split(values)
        return self._spread(keys), self._spread(values)

    def velocity(self, cache: KeysValues, x: Tensor, time: Tensor) -> Tensor:
        """Return the velocity `[N, J, P, M]` of `x [N, J, P, M]` at `time [N, J]`, from 1 (noise) to 0 (action).

        An action sees those before it alone, so that the first P of a chunk do not depend on the rest of it.
        """
        tokens = self._embed_actions(x, time).flatten(1, 2)
        place = torch.arange(x.shape[1] * x.shape[2], device=x.device)
        chunk, step = place // x.shape[2], (place % x.shape[2])[None]
        is_before = (chunk[:, None] == chunk) & (place[:, None] >= place)
        for layer, keys_values in zip(self._layers(), cache, strict=True):
            tokens = tokens + self._attend(layer, tokens, keys_values, step, is_before)
            tokens = tokens + layer.modules.mlp(layer.modules.post_attention_layernorm(tokens))
        velocity: Tensor = self._flow.action_out_proj(self._with_expert.lm_expert.norm(tokens).float())
        return velocity.view(x.shape)

    def _embed_actions(self, x: Tensor, time: Tensor) -> Tensor:
        """Return tokens `[N, J, P, E]` of noisy actions and their time."""
        actions = self._flow.action_in_proj(x)
        periods = (self.lerobot.config.min_period, self.lerobot.config.max_period)
        times = create_sinusoidal_pos_embedding(time.flatten(), actions.shape[-1], *periods, device=time.device)
        times = times.to(actions.dtype).view(*time.shape, 1, -1).expand_as(actions)
        hidden = silu(self._flow.action_time_mlp_in(torch.cat([actions, times], -1)))
        tokens: Tensor = self._flow.action_time_mlp_out(hidden)
        return tokens

    def _attend(
        self, layer: ExpertLayer, tokens: Tensor, keys_values: tuple[Tensor, Tensor], step: Tensor, is_before: Tensor
    ) -> Tensor:
        """Return what the tokens `[N, J P, E]` of J chunks see; all chunks query one cache, which is not repeated."""
        attention, (keys, values) = layer.modules.self_attn, keys_values
        normed, mask = layer.modules.input_layernorm(tokens), None
        num_seen = keys.shape[2]
        place = step if layer.is_cross else step + num_seen
        query = apply_rope(self._split(attention.q_proj(normed)), place).transpose(1, 2)
        if not layer.is_cross:
            own = apply_rope(self._split(attention.k_proj(normed)), place), self._split(attention.v_proj(normed))
            keys, values = (torch.cat([x, self._spread(y)], 2) for x, y in zip(keys_values, own, strict=True))
            mask = torch.cat([is_before.new_ones(len(is_before), num_seen), is_before], 1)
        seen = scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        result: Tensor = attention.o_proj(seen.transpose(1, 2).flatten(2))
        return result

    def _split(self, x: Tensor) -> Tensor:
        """Return heads `[..., H or G, F]`."""
        heads: Tensor = x.unflatten(-1, (-1, self._with_expert.config.text_config.head_dim))
        return heads

    def _spread(self, x: Tensor) -> Tensor:
        """Return keys or values `[N, S, G, F]` for each query's head, `[N, H, S, F]`."""
        text = self._with_expert.config.text_config
        return x.transpose(1, 2).repeat_interleave(text.num_attention_heads // text.num_key_value_heads, 1)

    def _layers(self) -> list[ExpertLayer]:
        model = self._with_expert
        every, has_cross = model.self_attn_every_n_layers, "cross" in model.attention_mode
        _, layers = model.get_model_layers([model.get_vlm_model().text_model, model.lm_expert])
        return [
            ExpertLayer(number, modules, has_cross and not (every > 0 and number % every == 0))
            for number, modules in enumerate(layers)
            if modules is not None
        ]

    def value(self, prefix: Tensor) -> Tensor:
        """Return V `[N]` of a prefix."""
        value: Tensor = self.value_head(prefix[..., -self.width :])
        return value

    def action_range(self) -> tuple[Tensor, Tensor]:
        """Return offset and scale `[A]` from the model's actions to the simulator's."""
        stats = getattr(self.lerobot.unnormalize_outputs, "buffer_action", None)
        if stats is None:  # NormalizationMode.IDENTITY
            size = self.lerobot.config.action_feature.shape[0]
            return torch.zeros(size), torch.ones(size)
        if "mean" in stats:
            return stats["mean"], stats["std"]
        return (stats["max"] + stats["min"]) / 2, (stats["max"] - stats["min"]) / 2

    def save_folder(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Write LeRobot's folder; what was trained is float32, the rest of the type that it had in the file.

        Args:
            folder: Where to.
            settings: Keys of `config.json` that differ from those of the folder that was read.
        """
        trained = {name for name, parameter in self.lerobot.named_parameters() if parameter.requires_grad}
        types = self.file_types | dict.fromkeys(trained, torch.float32)
        state = self.lerobot.state_dict().items()
        tensors = {name: tensor.detach().to("cpu", types[name]).contiguous() for name, tensor in state}
        write_atomically(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        write_atomically(folder / CONFIG, json.dumps(self.settings | dict(settings), indent=4).encode())


def build_model(folder: LeRobotFolder) -> Any:
    """Return LeRobot's policy of a folder, float32 on the CPU, with random weights.

    Raises:
        CheckpointError: LeRobot cannot build it; the message is its own.
    """
    try:
        with redirect_stdout(io.StringIO()):  # LeRobot tells of its layers
            config = PreTrainedConfig.from_pretrained(folder.path)
            config.device = "cpu"
            config.load_vlm_weights = False  # those of the folder take their place
            return SmolVLAPolicy(config).float()
    except Exception as error:  # draccus, transformers and tokenizers have errors of their own
        raise CheckpointError(
            f"policy.checkpoint = {folder.path}: LeRobot cannot build it: {type(error).__name__}: {one_line(error)}"
        ) from error


def load_weights(policy: nn.Module, folder: LeRobotFolder) -> dict[str, torch.dtype]:
    """Copy a folder's tensors into its policy; return the types that they have in the file, by name.

    Raises:
        CheckpointError: The file is damaged, does not fit, or its normalisation was never set.
    """
    source, own = f"policy.checkpoint = {folder.path}", policy.state_dict()
    try:
        stored = load_file(folder.path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{source}: {WEIGHTS} is truncated or damaged: {one_line(error)}") from None
    stored = {name.replace("model._orig_mod.", "model."): tensor for name, tensor in stored.items()}
    stored, _ = standardise_state_dict(stored, set(own), verbose=False)
    check_tensors(own, stored, source)
    unset = [name for name, tensor in stored.items() if "normalize_" in name and not bool(tensor.isfinite().all())]
    if unset:
        raise CheckpointError(f"{source}: its normalisation is not set: {unset[0]} is not finite")
    policy.load_state_dict(stored)
    return {name: tensor.dtype for name, tensor in stored.items()}


def one_line(error: Exception) -> str:
    """Return the beginning of a message without line breaks."""
    return " ".join(str(error).split())[:300]
