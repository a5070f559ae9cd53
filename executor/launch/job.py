"""``Job``: one start of a run, as its workers find it on any node: a folder of plain JSON.

The output folder is shared by all nodes. ``<output>/launch/`` is the side channel of a run:

    job.json            what to run, under which secret (readable by its owner only)
    address.json        where rank 0 listens
    heartbeat/rank*     where every rank is (``executor.watchdog``)
    stop.json           somebody wants the run to stop: signal, ``realexec stop``
    stopped.json        it has, after this many steps
    switch.json         somebody wants it to go over to the plan in switch-<id>.json
    switched.json       it has, before which step; or why it has not
    failed.json         the first failure that any node saw
    node*.json          a node's agent has ended, with the exit codes of its ranks

Nothing in it is pickled, and no port is opened for it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch

from executor.run import Run
from executor.trace import name_beside, write_json
from planner.algorithm import config_to_dict, find_algorithm, make_config
from planner.plan import ExecutionPlan
from planner.plan_schema import load_plan, save_plan
from profiles.errors import ConfigError
from profiles.hardware import MAX_DEVICES

LAUNCH_FOLDER = "launch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One start of a run. ``token`` tells its files from those of an earlier start."""

    output: str  # absolute
    token: str
    secret: str  # hex; only who can read job.json can speak to rank 0's store
    launcher: str
    num_ranks: int
    ranks_per_node: int
    num_threads: int  # of one rank
    hang_timeout_s: float
    bind: str  # an interface or an address; empty: the launcher's choice
    resume_from: str
    folder: str  # relative paths of the configuration start here
    python_path: tuple[str, ...]
    config: Mapping[str, Any]  # the run's, as it was resolved

    @property
    def num_nodes(self) -> int:
        return -(-self.num_ranks // self.ranks_per_node)

    def ranks_of(self, node: int) -> range:
        first = node * self.ranks_per_node
        return range(first, min(first + self.ranks_per_node, self.num_ranks))

    @property
    def launch_folder(self) -> Path:
        return Path(self.output) / LAUNCH_FOLDER

    @property
    def logs(self) -> Path:
        return Path(self.output) / "logs"

    def log_of(self, rank: int) -> Path:
        return self.logs / f"rank{rank:05}.log"

    def heartbeat_of(self, rank: int) -> Path:
        return self.launch_folder / "heartbeat" / f"rank{rank:05}.json"

    def quiet_s(self) -> float | None:
        """Since the last sign of life of any rank; None where none has given one."""
        beats = [path.stat().st_mtime for path in (self.launch_folder / "heartbeat").glob("*")]
        return time.time() - max(beats) if beats else None

    def save(self, plan: ExecutionPlan) -> None:
        """Write what workers read: the plan, and ``job.json`` in an emptied ``launch/``.

        Only its owner can enter that.
        """
        Path(self.output).mkdir(parents=True, exist_ok=True)
        save_plan(plan, Path(self.output) / "plan.json")
        shutil.rmtree(self.launch_folder, ignore_errors=True)
        self.launch_folder.mkdir(mode=0o700)
        (self.launch_folder / "heartbeat").mkdir()
        handle = os.open(self.launch_folder / "job.json", os.O_CREAT | os.O_WRONLY, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)

    # ---- words between agents, workers and whoever started them -----------------------------

    def tell(self, name: str, **values: Any) -> None:
        """Leave ``<name>.json``; a later word replaces an earlier one."""
        told = {"token": self.token, "time": time.time(), **values}
        write_json(self.launch_folder / f"{name}.json", told)

    def tell_first(self, name: str, **values: Any) -> None:
        """As ``tell``, but the first word stays: of several failures the first is the cause."""
        path = self.launch_folder / f"{name}.json"
        temporary = name_beside(path)
        told = {"token": self.token, "time": time.time(), **values}
        temporary.write_text(json.dumps(told), encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()

    def told(self, name: str) -> dict[str, Any] | None:
        """What ``<name>.json`` of this start says; None if there is none."""
        found = read_json(self.launch_folder / f"{name}.json")
        return found if found is not None and found.get("token") == self.token else None

    # ---- another plan while it runs --------------------------------------------------------

    def ask_switch(self, plan: ExecutionPlan) -> str:
        """Ask for ``plan`` from the next step on; under which name the answer will be."""
        name = secrets.token_hex(8)
        save_plan(plan, self._switch_plan(name))
        self.tell("switch", id=name)
        return name

    def asked_switch(self) -> str:
        """The name of the newest plan that was asked for; empty: none was."""
        told = self.told("switch")
        return "" if told is None else str(told["id"])

    def plan_asked(self, name: str) -> ExecutionPlan:
        """Raises ``PlanError`` where the file is damaged."""
        return load_plan(self._switch_plan(name))

    def _switch_plan(self, name: str) -> Path:
        return self.launch_folder / f"switch-{name}.json"


def read_json(path: Path) -> dict[str, Any] | None:
    """A small file's object; None where it is absent or only half there yet."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def plan_job(run: Run, *, launcher: str, ranks_per_node: int, options: Mapping[str, str]) -> Job:
    """A new start of ``run``, with a secret of its own; nothing is written."""
    num_ranks = run.plan.num_devices
    per_node = min(ranks_per_node, num_ranks)
    return Job(
        output=str(run.output.absolute()),
        token=secrets.token_hex(8),
        secret=secrets.token_hex(32),
        launcher=launcher,
        num_ranks=num_ranks,
        ranks_per_node=per_node,
        num_threads=max(1, torch.get_num_threads() // per_node),
        hang_timeout_s=run.config.hang_timeout_s,
        bind=options.get("bind", "127.0.0.1" if launcher == "local" else ""),
        resume_from=str(run.resume_from.absolute()) if run.resume_from else "",
        folder=str(Path.cwd()),
        python_path=_own_python_path(),
        config=config_to_dict(run.config),
    )


def _own_python_path() -> tuple[str, ...]:
    """Where this process finds modules beyond the interpreter's own folders."""
    entries = [Path(entry or ".").absolute() for entry in sys.path]
    installed = {Path(sys.prefix), Path(sys.base_prefix)}
    own = [e for e in entries if e.exists() and not installed & {e, *e.parents}]
    return tuple(dict.fromkeys(map(str, own)))


_KINDS: Mapping[type, Any] = {str: str, int: int, float: int | float}


def load_job(output: str | Path) -> Job:
    """The newest start of the run in ``output``.

    Raises:
        ConfigError: no run was started there, or its ``job.json`` is damaged.
    """
    file = Path(output) / LAUNCH_FOLDER / "job.json"
    found = read_json(file)
    if found is None:
        raise ConfigError(
            "no run was started here" if not file.exists() else "job.json is damaged",
            where=str(output), remedy="name the output folder of a run",
        )  # fmt: skip
    hints = get_type_hints(Job)
    unlike = [
        name
        for name in {**hints, **found}
        if name not in hints
        or not isinstance(found.get(name), _KINDS.get(hints[name], list | dict))
    ]
    if unlike or not 0 < found["ranks_per_node"] <= found["num_ranks"] <= MAX_DEVICES:
        raise ConfigError(
            f"job.json is damaged ({unlike[0] if unlike else 'num_ranks'})", where=str(output)
        )
    return Job(**{**found, "python_path": tuple(found["python_path"])})


def run_of(job: Job) -> Run:
    """What ``plan_job`` was given."""
    plan = load_plan(Path(job.output) / "plan.json")
    algorithm = find_algorithm(plan.problem.algorithm)
    config = make_config(algorithm.config_class, [], base=job.config)
    resume_from = Path(job.resume_from) if job.resume_from else None
    return Run(plan=plan, algorithm=algorithm, config=config, resume_from=resume_from)
