"""Protects Ctrl-C in the first second of ``realplan``: one line and exit code 130, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from realplan import main

REPOSITORY = Path(__file__).resolve().parents[1]
# Takes for ever to load, and takes what interrupts it for its own.
ENDLESS = """
import time
print("loading", flush=True)
while True:
    try:
        time.sleep(1)
    except BaseException:
        pass
"""


def interrupted_while_loading(folder: Path, module: str, *command: str) -> tuple[int, str]:
    """(exit code, stderr) of ``python -m command`` at Ctrl-C while it imports ``module``."""
    (folder / f"{module}.py").write_text(ENDLESS)
    path = os.pathsep.join([str(folder), str(REPOSITORY)])
    # What starts these tests in the background may ignore Ctrl-C, and a child with it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", *command], env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, told


def test_ctrl_c_while_it_loads(tmp_path: Path) -> None:
    found = interrupted_while_loading(tmp_path, "numba", "realplan", "models")
    assert found == (130, "realplan: interrupted\n")


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_ctrl_c_is_as_it_was_once_it_is_loaded(
    handler: signal.Handlers, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        assert main(["models"]) == 0
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "llama-70b" in capsys.readouterr().out
