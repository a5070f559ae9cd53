"""Protects the first word to a user who installed the planner alone, or who has no patience."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest

from executor.entry import main
from tests.test_realplan import interrupted_while_loading


def without(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name == "executor.cli":
            raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)
        return real_import(name, *args, **options)

    monkeypatch.delitem(sys.modules, "executor.cli", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)


def test_without_torch_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "torch")
    assert main(["run", "plan.json"]) == 2
    assert "torch is not installed; pip install 'realplan[executor]'" in capsys.readouterr().err


def test_another_missing_module_is_a_mistake_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "something_else")
    with pytest.raises(ModuleNotFoundError, match="something_else"):
        main([])


def test_ctrl_c_while_torch_is_loaded_is_no_traceback(tmp_path: Path) -> None:
    """Also where what is being loaded takes the interrupt for a mistake of its own."""
    found = interrupted_while_loading(tmp_path, "torch", "executor.entry", "run", "plan.json")
    assert found == (130, "realexec: interrupted\n")
