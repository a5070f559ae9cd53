"""Protects ``doctor``: a package of the same name that is not ours is named, and so
is what is missing.
"""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError

import pytest

from planner import doctor


def _states(monkeypatch: pytest.MonkeyPatch) -> dict[str, doctor.Finding]:
    """The findings without the search, which has its own test."""
    done = doctor.Finding(what="self-test", state="ok", text="")
    monkeypatch.setattr(doctor, "_self_test", lambda: done)
    return {finding.what: finding for finding in doctor.examine()}


def test_an_intruding_distribution_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {"executor": ["realplan", "executor-of-others"], "planner": ["realplan"]}
    monkeypatch.setattr(doctor, "packages_distributions", lambda: owners)
    found = _states(monkeypatch)["packages"]
    assert found.state == "wrong"
    assert "executor-of-others brings a package of the same name" in found.text


def test_a_package_from_elsewhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.importlib.util.find_spec

    def find_spec(name: str) -> ModuleSpec | None:
        if name != "executor":
            return real(name)
        return ModuleSpec(name, None, origin="/elsewhere/executor/__init__.py")

    monkeypatch.setattr(doctor.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(doctor, "packages_distributions", dict)
    found = _states(monkeypatch)["packages"]
    assert found.state == "wrong"
    assert "executor from /elsewhere, but planner from" in found.text


def test_what_is_missing_is_absent_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that planning needs is wrong where it lacks; one of the executor's is not."""

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", version)
    found = _states(monkeypatch)
    assert found["numpy"].state == "wrong"
    assert found["torch"].state == "absent"
    assert "realplan[executor]" in found["torch"].text
