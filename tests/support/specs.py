"""Environments as a test needs them described."""

from asyncflow.simulators.spec import EnvSpec


def spec_of(state, action_dim, cameras=None, horizon=10, **keys):
    """Return a spec with a state of this shape and images, camera -> shape."""
    images = {f"images.{name}": shape for name, shape in (cameras or {}).items()}
    return EnvSpec({"state": state} | images, action_dim, horizon, **keys)
