"""aesl_trl: the cold start for reinforcement learning, on TRL."""

from typing import TYPE_CHECKING


__version__ = "0.1.0"
__all__ = ["AESLSFTConfig", "AESLSFTTrainer", "DiversityCallback"]

if TYPE_CHECKING:
    from .training.callback import DiversityCallback
    from .training.config import AESLSFTConfig
    from .training.trainer import AESLSFTTrainer

_FILES = {"AESLSFTConfig": "config", "AESLSFTTrainer": "trainer", "DiversityCallback": "callback"}


def __getattr__(name: str):
    # We load these on first use, so that `aesl --help`, the metrics and the report start without torch and TRL
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".training.{_FILES[name]}", __name__), name)


def _check_versions() -> None:
    """Refuse packages outside of the bounds that aesl_trl was installed with: TRL's inside changes."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    try:
        needed = [Requirement(line) for line in requires(__name__) or []]
    except PackageNotFoundError:  # this is a checkout that was never installed, so no bounds are known
        return
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = version(requirement.name)
        if not requirement.specifier.contains(found, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            problem = f"needs {wanted}, but {requirement.name} {found} is installed"
            raise ImportError(f"aesl_trl {__version__} {problem}: pip install {wanted!r}")


_check_versions()
