"""Put the stand-in of reasoning-gym in the place of the package, for the tests that must not need it."""

import sys
from pathlib import Path

from aesl_trl.rewards import gym


STAND_IN = Path(__file__).parent / "gym_stand_in"


def use_stand_in(monkeypatch) -> None:
    """Let this process and the grading children that it starts import the stand-in."""
    for name in ("reasoning_gym", "reasoning_gym.factory"):
        monkeypatch.setitem(sys.modules, name, None)  # so that what stood there comes back at the end
        del sys.modules[name]
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN), prepend=":")
    gym.scorer.cache_clear()
