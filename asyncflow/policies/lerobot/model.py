"""The common base of LeRobot's vision-language-action models, with the methods of a velocity field.

It builds LeRobot's model, and reads and writes its folder. This file loads LeRobot, an optional extra.

Shapes: N decisions, S tokens of the prefix, H attention heads, G of them for keys and values, F size of a head, E width
of the expert, J denoising steps evaluated at once, P predicted actions, A action size, M action size with the model's
padding.
"""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.constants import OBS_STATE
from lerobot.policies.smolvla.modeling_smolvla import create_sinusoidal_pos_embedding
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import dynamic_module_utils

from asyncflow.config.lerobot_folder import CONFIG, WEIGHTS, LeRobotFolder, select_statistics
from asyncflow.config.observations import TASK, Shapes
from asyncflow.errors import CheckpointError
from asyncflow.files import write_atomically
from asyncflow.policies.policy_file import check_tensors, find_shared
from asyncflow.policies.vla.model import KeysValues


class LeRobotModel(nn.Module, ABC):
    """A policy of LeRobot with the methods of a velocity field; a subclass knows its layers.

    Attributes:
        lerobot: LeRobot's policy; its state dict is that of the folder.
        padded_action_dim: M.
        lerobot_class: LeRobot's class of such policies.
        overrides: Keys of LeRobot's configuration that are set, whatever the folder says.
    """

    lerobot_class: ClassVar[Any]
    overrides: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, folder: LeRobotFolder, cameras: Mapping[str, str]) -> None:
        """Read a folder.

        Args:
            folder: What to read.
            cameras: LeRobot's name of a picture -> its name in an observation.

        Raises:
            CheckpointError: Its model cannot be built, or its tensors do not fit it.
        """
        super().__init__()
        self.lerobot: Any = self._build(folder)
        self.file_types = self._load_weights(folder)
        self.settings: dict[str, Any] = json.loads((folder.path / CONFIG).read_text(encoding="utf-8"))
        self.cameras = dict(cameras)
        self.padded_action_dim: int = self.lerobot.config.max_action_dim

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """All of what `encode_prefix` runs; a view, so that the state dict keeps LeRobot's names."""

    @property
    @abstractmethod
    def text_config(self) -> Any:
        """The sizes of the language model."""

    @abstractmethod
    def encode_prefix(self, obs: TensorDictBase) -> Tensor | TensorDictBase:
        """Return what expert and value see of observations."""

    @abstractmethod
    def cache_prefix(self, prefix: Any) -> SeenPrefix:
        """Return keys and values of a prefix for each layer of the expert."""

    @abstractmethod
    def velocity(self, cache: SeenPrefix, x: Tensor, time: Tensor) -> Tensor:
        """Return the velocity `[N, J, P, M]` of `x [N, J, P, M]` at `time [N, J]`, from 1 (noise) to 0 (action)."""

    @abstractmethod
    def value(self, prefix: Any) -> Tensor:
        """Return V `[N]` of a prefix."""

    @abstractmethod
    def _rename(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a folder's tensors by the names that they have in LeRobot's policy."""

    @property
    def flow(self) -> Any:
        """LeRobot's flow matching: the expert and the projections of state, actions and time."""
        return self.lerobot.model

    def look_at_black(self, image_shapes: Shapes) -> None:
        """Denoise a step on black pictures, which shows that the model runs.

        Raises:
            Exception: Whatever the model's code fails with.
        """
        chunk, time = torch.zeros(1, 1, 1, self.padded_action_dim), torch.ones(1, 1)
        with torch.no_grad():
            self.velocity(self.cache_prefix(self.encode_prefix(self.black_obs(image_shapes))), chunk, time)

    def black_obs(self, image_shapes: Shapes, num_obs: int = 1) -> TensorDict:
        """Return observations of black pictures, [N], of one task after the other."""
        black = {
            camera: torch.zeros(num_obs, *image_shapes[camera], dtype=torch.uint8) for camera in self.cameras.values()
        }
        state = torch.zeros(num_obs, self.lerobot.config.robot_state_feature.shape[0])
        seen = {"images": TensorDict(black, [num_obs]), "state": state, TASK: torch.arange(num_obs)}
        return TensorDict(seen, [num_obs])

    def read_instructions(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return their tokens `[K, S]`, and which of them are no padding; the tokenizer is given up."""
        state = torch.zeros(len(texts), self.lerobot.config.robot_state_feature.shape[0])
        words, is_word = self.lerobot.prepare_language({OBS_STATE: state, "task": list(texts)})
        self.lerobot.language_tokenizer = None  # the words are known: it need not be copied for the collector
        return words, is_word

    def normalize_obs(self, obs: TensorDictBase) -> dict[str, Tensor]:
        """Return pictures and state by LeRobot's names, normalised."""
        batch = {name: obs["images", camera].float() / 255 for name, camera in self.cameras.items()}
        normalized: dict[str, Tensor] = self.lerobot.normalize_inputs(batch | {OBS_STATE: obs["state"]})
        return normalized

    def embed_actions(self, x: Tensor, time: Tensor, periods: tuple[float, float]) -> Tensor:
        """Return tokens `[N, J, P, E]` of noisy actions and their time, in sines of these shortest and longest."""
        actions = self.flow.action_in_proj(x)
        times = create_sinusoidal_pos_embedding(time.flatten(), actions.shape[-1], *periods, device=time.device)
        times = times.to(actions.dtype).view(*time.shape, 1, -1).expand_as(actions)
        hidden = silu(self.flow.action_time_mlp_in(torch.cat([actions, times], -1)))
        tokens: Tensor = self.flow.action_time_mlp_out(hidden)
        return tokens

    def split_heads(self, x: Tensor) -> Tensor:
        """Return heads `[..., H or G, F]`."""
        heads: Tensor = x.unflatten(-1, (-1, self.text_config.head_dim))
        return heads

    def spread_heads(self, x: Tensor) -> Tensor:
        """Return keys or values `[N, S, G, F]` for each query's head, `[N, H, S, F]`; of one head, a view."""
        text = self.text_config
        spread = x.transpose(1, 2).unsqueeze(2)
        return spread.expand(-1, -1, text.num_attention_heads // text.num_key_value_heads, -1, -1).flatten(1, 2)

    def action_range(self) -> tuple[Tensor, Tensor]:
        """Return offset and scale `[A]` from the model's actions to the simulator's."""
        stats = getattr(self.lerobot.unnormalize_outputs, "buffer_action", None)
        if stats is None:  # NormalizationMode.IDENTITY
            size = self.lerobot.config.action_feature.shape[0]
            return torch.zeros(size), torch.ones(size)
        if "mean" in stats:
            return stats["mean"], stats["std"]
        return (stats["max"] + stats["min"]) / 2, (stats["max"] - stats["min"]) / 2

    def save_folder(self, folder: Path, num_steps: int, n_action_steps: int) -> None:
        """Write LeRobot's folder; what was trained is float32, the rest of the type that it had in the file.

        Args:
            folder: Where to.
            num_steps: Denoising steps with which LeRobot is to decide.
            n_action_steps: Actions of a chunk that it is to execute, where its configuration can say so.
        """
        trained = {name for name, parameter in self.lerobot.named_parameters() if parameter.requires_grad}
        types = self.file_types | dict.fromkeys(trained, torch.float32)
        state = self.lerobot.state_dict()
        shared = find_shared(state)  # written twice, as LeRobot reads them
        types |= {name: types[kept] for name, kept in shared.items()}
        tensors = {
            name: tensor.detach().to("cpu", types[name], copy=name in shared).contiguous()
            for name, tensor in state.items()
        }
        settings = self.settings | {"num_steps": num_steps} | self._execution_settings(n_action_steps)
        write_atomically(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        write_atomically(folder / CONFIG, json.dumps(settings, indent=4).encode())

    def _execution_settings(self, n_action_steps: int) -> dict[str, Any]:
        return {"n_action_steps": n_action_steps}

    def _build(self, folder: LeRobotFolder) -> Any:
        """Return LeRobot's policy of a folder, float32 on the CPU, with random weights.

        Raises:
            CheckpointError: LeRobot cannot build it; the message is its own.
        """
        try:
            with redirect_stdout(io.StringIO()), _without_foreign_code():  # LeRobot tells of its layers
                config = PreTrainedConfig.from_pretrained(folder.path)
                for key, value in {"device": "cpu", **self.overrides}.items():
                    setattr(config, key, value)
                return self.lerobot_class(config).float()
        except Exception as error:  # draccus, transformers and tokenizers have errors of their own
            cause = f" ({one_line(error.__cause__)})" if error.__cause__ else ""  # draccus does not say what is wrong
            raise CheckpointError(
                f"policy.checkpoint = {folder.path}: LeRobot cannot build it: {type(error).__name__}: "
                f"{one_line(error)}{cause}"
            ) from error

    def _load_weights(self, folder: LeRobotFolder) -> dict[str, torch.dtype]:
        """Copy a folder's tensors into its policy; return the types that they have in the file, by name.

        Raises:
            CheckpointError: The file is damaged, does not fit, or its normalisation was never set.
        """
        source, own = f"policy.checkpoint = {folder.path}", self.lerobot.state_dict()
        try:
            stored = load_file(folder.path / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{source}: {WEIGHTS} is truncated or damaged: {one_line(error)}") from None
        stored = {name.replace("model._orig_mod.", "model."): tensor for name, tensor in stored.items()}
        stored = self._rename(select_statistics(stored, folder.statistics))
        check_tensors(own, stored, source)
        unset = [name for name, tensor in stored.items() if "normalize_" in name and not bool(tensor.isfinite().all())]
        if unset:
            raise CheckpointError(f"{source}: its normalisation is not set: {unset[0]} is not finite")
        self.lerobot.load_state_dict(stored)
        return {name: tensor.dtype for name, tensor in stored.items()}


class SeenPrefix(NamedTuple):
    """What an expert sees of a prefix.

    Attributes:
        layers: Keys and values for each of its layers.
        num_tokens: S.
        is_token: `[N, S]` which tokens are no padding, where instructions differ in length; None where all are.
    """

    layers: KeysValues
    num_tokens: int
    is_token: Tensor | None = None

    def end(self) -> int | Tensor:
        """Return the place that follows the prefix: one, or `[N, 1]`."""
        return self.num_tokens if self.is_token is None else self.is_token.sum(1, keepdim=True)

    def mask(self) -> Tensor | None:
        """Return which tokens of the prefix may be seen, `[N, 1, 1, S]`; None if all of them."""
        return None if self.is_token is None else self.is_token[:, None, None]

    def mask_with(self, among: Tensor) -> Tensor:
        """Return which tokens L of the expert's own may see, `[L, S + L]` or `[N, 1, L, S + L]`.

        Args:
            among: `[L, L]`, of each other.
        """
        if self.is_token is None:
            return torch.cat([among.new_ones(len(among), self.num_tokens), among], 1)
        seen = self.is_token[:, None].expand(-1, len(among), -1)
        return torch.cat([seen, among.expand(len(seen), -1, -1)], 2)[:, None]


def rows_of(table: Tensor, obs: TensorDictBase) -> Tensor:
    """Return the row of a table `[K, ...]` that belongs to each observation's task, `[N, ...]`; one row serves all."""
    return table.expand(len(obs), *table.shape[1:]) if len(table) == 1 else table[obs[TASK]]


@contextmanager
def _without_foreign_code() -> Iterator[None]:
    """Let transformers refuse a model that brings code of its own; it would ask whether to run it, and run it."""
    timeout_s, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = timeout_s


def one_line(error: BaseException) -> str:
    """Return the beginning of a message without line breaks."""
    return " ".join(str(error).split())[:300]
