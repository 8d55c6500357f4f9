"""aesl_trl: the cold start for reinforcement learning, on TRL."""

from typing import TYPE_CHECKING


__version__ = "0.1.0"
__all__ = ["AESLSFTConfig", "AESLSFTTrainer", "DiversityCallback"]

if TYPE_CHECKING:
    from .training.callback import DiversityCallback
    from .training.config import AESLSFTConfig
    from .training.trainer import AESLSFTTrainer

_HOMES = {
    "AESLSFTConfig": "training.config",
    "AESLSFTTrainer": "training.trainer",
    "DiversityCallback": "training.callback",
}


def __getattr__(name: str):
    # We load these on first use, so that `aesl --help`, the metrics and the report start without torch and TRL
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def _check_versions() -> None:
    """Refuse packages outside of the bounds that aesl_trl was installed with: TRL's inside changes between versions.

    Raises:
        ImportError: one line that names the package, its version and the command that mends it.
    """
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
            raise ImportError(
                f"aesl_trl {__version__} needs {wanted}, but {requirement.name} {found} is installed: "
                f"pip install {wanted!r}"
            )


_check_versions()
