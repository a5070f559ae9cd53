"""Protects who installs: the wheel has all that the code reads, and planning needs no torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("profiles", "planner", "executor", "experiments")


def built_wheel(folder: Path) -> zipfile.ZipFile:
    """The wheel of a copy of the sources: building leaves files beside them."""
    pytest.importorskip("setuptools", minversion="77")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".ipynb_checkpoints")
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    for name in ("realplan.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(folder), str(source)], check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    wheel = built_wheel(tmp_path)
    names = set(wheel.namelist())
    for package in PACKAGES:
        folder = REPOSITORY / package
        modules = {p.relative_to(REPOSITORY).as_posix() for p in folder.rglob("*.py")}
        assert modules <= names, sorted(modules - names)[:5]
        assert f"{package}/py.typed" in names
    shipped = {
        p.relative_to(REPOSITORY).as_posix()
        for folder in ("profiles/data", "experiments/data")
        for p in (REPOSITORY / folder).rglob("*")
        if p.is_file()
    }
    assert shipped
    assert shipped <= names, sorted(shipped - names)[:5]
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "realplan.py", *PACKAGES,
    }  # fmt: skip
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    text = wheel.read(entry_points).decode()
    for line in ("realplan = realplan:main", "realexec = executor.entry:main"):
        assert line in text
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_planning_needs_nothing_that_is_not_installed_with_it() -> None:
    """Of extras: torch, transformers, plotly and the like."""
    extras = (
        "torch", "transformers", "safetensors", "tensorboard", "vaderSentiment", "datasets", "ray",
        "submitit", "plotly", "kaleido", "IPython", "hypothesis", "pytest",
    )  # fmt: skip
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({extras!r}))\n"
        "import planner, planner.whatif\n"
        "from planner.cli import main\n"
        "sys.exit(main(['baselines', '--model', 'tiny', '--gpus', '2', 'batch_size=4']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "symmetric" in done.stdout
