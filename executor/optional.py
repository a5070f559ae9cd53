"""Packages that some users need and none must have."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from profiles.errors import ConfigError


def optional_package(name: str, *, where: str, remedy: str) -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed; ``where`` says who asks for it.
    """
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ConfigError(f"{package} is not installed", where=where, remedy=remedy) from None


def check_package(name: str, *, where: str, remedy: str) -> None:
    """Raise as ``optional_package`` does, without the time that importing takes."""
    if find_spec(name) is None:
        raise ConfigError(f"{name} is not installed", where=where, remedy=remedy)
