"""Stand in for reasoning-gym where it is not installed: the same interface with five small tasks."""

from reasoning_gym.factory import create_dataset


__all__ = ["create_dataset"]
