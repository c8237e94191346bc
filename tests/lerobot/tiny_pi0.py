"""Writes a tiny pi0 with random weights, as LeRobot does; nothing is downloaded.

LeRobot's code names the sizes of pi0, its tokenizer and bfloat16. What stands in for them is here. As a program it is
`asyncflow` with those sizes.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

import torch
from lerobot.configs.types import NormalizationMode
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from lerobot.policies.pi0.paligemma_with_expert import PaliGemmaWithExpertConfig
from tiny_smolvla import CAMERA, CHUNK, STATE, STATS, common_settings, make_tokenizer, write_random
from transformers import CONFIG_MAPPING

from asyncflow.cli import main

WORDS = ["<pad>", "<unk>", "<image>", "reach", "push", "the", "goal"]
TEXT = {
    "model_type": "gemma",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_image_tokens": 4,
    "vocab_size": len(WORDS),
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 32,
    "vision_use_head": False,
}
EXPERT = TEXT | {"hidden_size": 24, "intermediate_size": 48, "pad_token_id": 0}


@contextmanager
def tiny_sizes():
    """Build all that LeRobot calls pi0 in tiny sizes."""
    build = PaliGemmaWithExpertConfig.__init__

    def build_tiny(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.paligemma_config = CONFIG_MAPPING["paligemma"](
            text_config=TEXT, vision_config=VISION, hidden_size=32, projection_dim=32, image_token_index=2
        )
        self.gemma_expert_config = CONFIG_MAPPING["gemma"](**EXPERT)

    with patch.object(PaliGemmaWithExpertConfig, "__init__", build_tiny):
        yield


@contextmanager
def float32():
    """Let LeRobot compute in float32 where its code names bfloat16."""
    with patch.object(torch, "bfloat16", torch.float32):
        yield


def write_cache(folder):
    """Write a cache of Hugging Face that holds the tokenizer alone."""
    repository = folder / "models--google--paligemma-3b-pt-224"
    make_tokenizer(WORDS).save_pretrained(repository / "snapshots" / "0")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    return folder


def write_policy(folder, stats=STATS, normalization=NormalizationMode.MEAN_STD, **changes):
    """Write a policy folder; the caller stands in for sizes and tokenizer."""
    own = {"resize_imgs_with_padding": (28, 28), "proj_width": 24, "tokenizer_max_length": 8}
    config = PI0Config(**common_settings(normalization) | own | changes)
    return write_random(folder, lambda: PI0Policy(config, dataset_stats=stats))


def their_actions(folder, obs, noise, num_steps=None, instruction="reach the goal"):
    """Return LeRobot's own actions [N, chunk, A] from noise [N, chunk, max_action_dim]; its own K by default."""
    policy = PI0Policy.from_pretrained(folder)
    policy.config.num_steps = num_steps or policy.config.num_steps
    task = [instruction] * len(noise)
    batch = {STATE: obs["state"], CAMERA: obs["images", "top"].float() / 255, "task": task}
    actions = [policy.select_action(batch, noise=noise.clone()) for _ in range(CHUNK)]  # it is written to
    return torch.stack(actions, 1)


if __name__ == "__main__":
    with tiny_sizes():
        main()
