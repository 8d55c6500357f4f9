"""aesl_trl: the cold start for reinforcement learning, on TRL."""

from typing import TYPE_CHECKING


__version__ = "0.1.0"
__all__ = ["AESLSFTConfig", "AESLSFTTrainer", "DiversityCallback"]

if TYPE_CHECKING:
    from .callback import DiversityCallback
    from .config import AESLSFTConfig
    from .trainer import AESLSFTTrainer

_HOMES = {"AESLSFTConfig": "config", "AESLSFTTrainer": "trainer", "DiversityCallback": "callback"}


def __getattr__(name: str):
    # Loaded on first use, so that `aesl --help`, the metrics and the report start without torch and TRL
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    _check_trl_version()
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def _check_trl_version() -> None:
    from importlib.metadata import version

    from packaging.version import Version

    if not Version("1.15") <= Version(version("trl")) < Version("2"):
        raise ImportError(
            f"aesl_trl needs trl>=1.15,<2, but trl {version('trl')} is installed: pip install 'trl>=1.15,<2'"
        )
