"""Writes a tiny SmolVLA with random weights, as LeRobot does; nothing is downloaded."""

import torch
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

CAMERA, STATE = "observation.images.top", "observation.state"
STATE_DIM, ACTION_DIM, CHUNK = 4, 2, 5
SPECIAL = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
VIDEO = {"max_frames": 1, "fps": 1, "video_size": {"longest_edge": 32}}  # nothing here is a video; the processor asks
WORDS = ["<pad>", "<unk>", *SPECIAL.values(), "reach", "push", "the", "goal"]
STATS = {
    STATE: {
        "mean": torch.tensor([0.1, -0.2, 0.3, 0.0]),
        "std": torch.tensor([0.5, 0.6, 0.7, 0.8]),
        "min": -torch.tensor([1.0, 1.1, 1.2, 1.3]),
        "max": torch.tensor([1.0, 1.5, 1.0, 1.2]),
    },
    "action": {
        "mean": torch.tensor([0.2, -0.1]),
        "std": torch.tensor([0.4, 0.3]),
        "min": torch.tensor([-0.9, -0.8]),
        "max": torch.tensor([1.0, 0.7]),
    },
}


def make_tokenizer(words, **special):
    """Return a tokenizer that knows a few words; the first is padding, the second any other."""
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[1]))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=words[0], unk_token=words[1], extra_special_tokens=special
    )


def write_vlm(folder):
    """Write the vision-language model's configuration and its tokenizer; LeRobot takes its weights from the policy."""
    fast = make_tokenizer(WORDS, **SPECIAL)
    SmolVLMProcessor(SmolVLMImageProcessor(), fast, SmolVLMVideoProcessor(video_sampling=VIDEO)).save_pretrained(folder)
    text = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": len(WORDS),
        "pad_token_id": 0,
        "max_position_embeddings": 128,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=2, image_token_id=2, pad_token_id=0)
    config.save_pretrained(folder)
    return folder


def write_policy(folder, vlm, stats=STATS, normalization=NormalizationMode.MEAN_STD, **changes):
    """Write a policy folder; layers 0 and 2 of the expert attend to each other, 1 and 3 to the prefix alone."""
    own = {"resize_imgs_with_padding": (32, 32), "vlm_model_name": str(vlm), "num_vlm_layers": 4}
    config = SmolVLAConfig(**common_settings(normalization) | own | changes)
    return write_random(folder, lambda: SmolVLAPolicy(config, dataset_stats=stats))


def common_settings(normalization):
    """Return what the configurations of all types have alike."""
    return {
        "input_features": {
            STATE: PolicyFeature(FeatureType.STATE, (STATE_DIM,)),
            CAMERA: PolicyFeature(FeatureType.VISUAL, (3, 28, 28)),
        },
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        "normalization_mapping": {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": normalization,
            "ACTION": normalization,
        },
        "device": "cpu",
        "chunk_size": CHUNK,
        "n_action_steps": CHUNK,
        "max_state_dim": 6,
        "max_action_dim": 3,
    }


def write_random(folder, build):
    """Write a policy with random weights, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = build()
        for name, parameter in policy.named_parameters():
            if parameter.dim() > 1 and "normalize" not in name:  # as they come they are so small that all is alike
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    policy.save_pretrained(folder)
    return folder


def their_actions(folder, obs, noise, num_steps=None, instruction="reach the goal"):
    """Return LeRobot's own actions [N, chunk, A] from noise [N, chunk, max_action_dim]; its own K by default."""
    policy = SmolVLAPolicy.from_pretrained(folder)
    policy.config.num_steps = num_steps or policy.config.num_steps
    batch = {STATE: obs["state"], CAMERA: obs["images", "top"].float() / 255, "task": instruction}
    return policy.predict_action_chunk(batch, noise=noise.clone())  # it is written to
