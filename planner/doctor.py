"""``realplan doctor``: is this installation whole, and does the planner work here?

Each check is a ``Finding``: what was looked at, what was found, and where something is wrong what
to do. Nothing is installed or changed.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.resources import files
from pathlib import Path
from typing import Literal

from planner.algorithm import find_algorithm, make_config, make_problem
from planner.resolve import make_costs
from planner.search import search
from profiles.catalogue import MODELS
from profiles.clusters import machine_memory_bytes, make_cluster
from profiles.errors import UserError
from profiles.units import format_bytes, format_seconds

PACKAGES = ("profiles", "planner", "executor", "experiments")
DISTRIBUTION = "realplan"

State = Literal["ok", "absent", "wrong"]

# (distribution, needed to plan?, what it is for)
_LIBRARIES = (
    ("numpy", True, "planning"),
    ("pandas", True, "tables of scenarios"),
    ("hydra-core", True, "key=value options"),
    ("networkx", True, "dataflow graphs"),
    ("torch", False, "running plans: pip install 'realplan[executor]'"),
    ("transformers", False, "running plans: pip install 'realplan[executor]'"),
    ("flash-attn", False, "faster attention on GPUs: pip install 'realplan[cuda]'"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """``absent``: something optional is not there. ``wrong``: realplan cannot be trusted so."""

    what: str
    state: State
    text: str
    remedy: str = ""


def examine() -> list[Finding]:
    """All checks, the cheapest first. Nothing raises: what goes wrong is a finding."""
    found = [_realplan(), *(_library(*row) for row in _LIBRARIES)]
    return [*found, *_origins(), _devices(), _profiles(), _self_test()]


def _realplan() -> Finding:
    python = f"Python {platform.python_version()}"
    try:
        return Finding(what=DISTRIBUTION, state="ok", text=f"{version(DISTRIBUTION)}, {python}")
    except PackageNotFoundError:
        return Finding(
            what=DISTRIBUTION, state="wrong", text=f"not installed (a bare checkout), {python}",
            remedy="algorithms are found among installed packages: pip install -e .",
        )  # fmt: skip


def _library(name: str, needed: bool, purpose: str) -> Finding:
    try:
        return Finding(what=name, state="ok", text=version(name))
    except PackageNotFoundError:
        if needed:
            return Finding(
                what=name, state="wrong", text=f"not installed, needed for {purpose}",
                remedy=f"pip install {name}",
            )  # fmt: skip
        return Finding(what=name, state="absent", text=f"not installed; for {purpose}")


def _origins() -> list[Finding]:
    """Our packages' names are common words: all must come from one place, and from us."""
    homes: dict[str, str] = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = None if spec is None else spec.origin
        homes[name] = "nowhere" if origin is None else str(Path(origin).parent.parent)
    own = homes["planner"]
    astray = {name: home for name, home in homes.items() if home != own}
    if astray:
        text = ", ".join(f"{name} from {home}" for name, home in astray.items())
        packages = Finding(
            what="packages", state="wrong", text=f"{text}, but planner from {own}",
            remedy="install realplan into a virtual environment of its own",
        )  # fmt: skip
    else:
        packages = Finding(what="packages", state="ok", text=f"all of {own}")
    owners = packages_distributions()
    others = sorted({d for n in PACKAGES for d in owners.get(n, ()) if d != DISTRIBUTION})
    if not others:
        return [packages]
    return [
        packages,
        Finding(
            what="packages",
            state="wrong",
            text=f"{' and '.join(others)} brings a package of the same name",
            remedy=f"pip uninstall {' '.join(others)}, or use a virtual environment",
        ),
    ]


def _devices() -> Finding:
    memory = format_bytes(machine_memory_bytes())
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding(what="devices", state="absent", text=f"no NVIDIA GPU; CPU with {memory}")
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        ended = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return Finding(
            what="devices", state="wrong", text="nvidia-smi does not answer",
            remedy="see whether the driver works: nvidia-smi",
        )  # fmt: skip
    names = [line.strip() for line in ended.stdout.splitlines() if line.strip()]
    if ended.returncode or not names:
        return Finding(
            what="devices", state="wrong", text="nvidia-smi finds no GPU",
            remedy="see whether the driver works: nvidia-smi",
        )  # fmt: skip
    return Finding(what="devices", state="ok", text=f"{len(names)} x {names[0]}; CPU with {memory}")


def _profiles() -> Finding:
    folder = files("profiles") / "data"
    names = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []
    if not names:
        return Finding(what="shipped profiles", state="absent", text="none: costs of peak rates")
    return Finding(what="shipped profiles", state="ok", text=", ".join(names))


def _self_test() -> Finding:
    """Search PPO on two GPUs: the bound must not be above the plan that was found."""
    start = time.monotonic()
    try:
        algorithm = find_algorithm("ppo")
        config = make_config(
            algorithm.config_class, ["batch_size=8", "prompt_len=16", "response_len=16"]
        )
        spec = MODELS["tiny"]
        problem = make_problem(
            algorithm, config, model=spec, critic=spec, cluster=make_cluster("a100", 2)
        )
        result = search(problem, make_costs(problem.cluster, None), seed=1, time_limit_s=5.0)
    except UserError as error:
        return Finding(
            what="self-test", state="wrong", text=str(error), remedy="reinstall: pip install ."
        )
    estimate = result.plan.estimate
    assert estimate is not None
    if not 0 < result.lower_bound_s <= estimate.step_s * (1 + 1e-9):
        return Finding(
            what="self-test", state="wrong", text="a lower bound is above the plan's estimate",
            remedy="reinstall: pip install .",
        )  # fmt: skip
    took = format_seconds(time.monotonic() - start)
    return Finding(
        what="self-test",
        state="ok",
        text=f"planned PPO on 2 GPUs in {took}, {result.gap:.1%} from the bound",
    )
