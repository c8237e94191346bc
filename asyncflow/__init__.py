"""Asynchronous PPO fine-tuning of flow-matching robot policies in robosuite and robomimic."""

__version__ = "0.1.0"
