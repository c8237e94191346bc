"""LoRA: small trained matrices beside the frozen ones of a backbone (arXiv:2106.09685), by the `peft` package.

This file chooses the layers that get one. The package is an optional extra and is imported when a configuration asks
for it.
"""

from __future__ import annotations

from torch import nn

from asyncflow.config.sections import VLAConfig
from asyncflow.errors import ConfigError


def add_lora(model: nn.Module, config: VLAConfig) -> None:
    """Freeze the module `backbone` and put an adapter of `lora_rank` beside its linear layers, which then train.

    At first an adapter adds nothing. Its dropout is 0, as everywhere in PPO.

    Raises:
        ConfigError: There is no backbone, no such layer, or no `peft`.
    """
    key = f"policy.vla.lora_rank = {config.lora_rank}"
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise ConfigError(f"{key}: {type(model).__name__} has no module `backbone`")
    try:
        from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415  optional, and takes seconds to load
    except ImportError:
        raise ConfigError(f"{key} needs the package peft: pip install 'asyncflow[lora]'") from None
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    alpha = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    adapters = LoraConfig(
        r=config.lora_rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=config.lora_targets or linear
    )
    try:
        inject_adapter_in_model(adapters, backbone)
    except ValueError as error:
        raise ConfigError(f"policy.vla.lora_targets = {config.lora_targets}: {' '.join(str(error).split())}") from None
