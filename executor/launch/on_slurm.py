"""SLURM, through ``submitit``: one task a node of the plan, each running ``agent.run_node``.

Whatever SLURM is told comes from ``--set``: ``partition=gpu``, ``time=120`` (minutes), any other
option of sbatch by its name (``nodelist=n[1-4]``, ``constraint=…``, ``account=…``); ``setup=`` is
a line of shell before the start (``module load cuda``), ``python=`` what starts Python on the
nodes (``apptainer exec image.sif python``). A job that SLURM ends for its time is announced
``signal_delay_s`` before: it stops after its step, with a checkpoint.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from executor.launch.agent import POLL_S, run_node, stops_by_signal
from executor.launch.job import Job, load_job
from executor.optional import optional_package
from executor.run import Run
from profiles.errors import ConfigError

OPTIONS = None  # sbatch has too many to list: it refuses what it does not know
OWN = ("bind", "setup", "python", "time", "signal_delay_s", "cluster")
_POLL_SLURM_S = 2.0
# What was written on a node may be seen here later on a network file system.
_LATE_S = 30.0


def import_submitit() -> Any:
    return optional_package(
        "submitit", where="--launcher slurm", remedy="pip install 'realplan[slurm]'"
    )


def parameters(job: Job, run: Run, options: Mapping[str, str]) -> dict[str, Any]:
    """What submitit is told: nodes, tasks and devices follow from the plan."""
    per_node = job.ranks_per_node
    found: dict[str, Any] = {
        "name": f"realexec-{Path(job.output).name}",
        "nodes": job.num_nodes,
        "slurm_ntasks_per_node": 1,
        "cpus_per_task": per_node,
        "slurm_signal_delay_s": _number(options, "signal_delay_s", 120),
        "timeout_min": _number(options, "time", 24 * 60),
        "stderr_to_stdout": True,
    }
    if run.plan.problem.cluster.kind == "cuda":
        found["gpus_per_node"] = per_node
    if "setup" in options:
        found["slurm_setup"] = [options["setup"]]
    others = {name: value for name, value in options.items() if name not in OWN}
    if others:
        found["slurm_additional_parameters"] = others
    return found


def _number(options: Mapping[str, str], name: str, default: int) -> int:
    text = options.get(name, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"'{text}' is not a positive whole number", where=f"--set {name}")
    return int(text)


def _executor(job: Job, run: Run, options: Mapping[str, str]) -> Any:
    submitit = import_submitit()
    cluster = options.get("cluster", "slurm")
    python = options.get("python")
    own = {"slurm_python": python} if python and cluster == "slurm" else {}
    try:
        executor = submitit.AutoExecutor(folder=Path(job.output) / "slurm", cluster=cluster, **own)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"SLURM cannot be used here ({error})", where="--launcher slurm",
            remedy="start realexec where sbatch is on PATH",
        ) from None  # fmt: skip
    executor.update_parameters(**parameters(job, run, options))
    return executor


def start(job: Job, run: Run, options: Mapping[str, str]) -> None:
    """Submit, and wait until every node has ended."""
    submitit = import_submitit()
    executor = _executor(job, run, options)
    try:
        submitted = executor.submit(run_task, job.output)
    except submitit.core.utils.FailedJobError as error:
        raise ConfigError(
            f"SLURM refused the job ({str(error).strip().splitlines()[-1]})",
            where="--launcher slurm", remedy="look at --dry-run, then at --set",
        ) from None  # fmt: skip
    job.tell("submitted", job_id=submitted.job_id)
    try:
        with stops_by_signal(job):
            _wait(job, submitted)
    finally:
        if not _all_ended(job):
            submitted.cancel()


def _all_ended(job: Job) -> bool:
    return all(job.told(f"node{node}") is not None for node in range(job.num_nodes))


def _wait(job: Job, submitted: Any) -> None:
    """Until all nodes have left word, or SLURM knows the job no more and none came late."""
    asked_s, gone_s = 0.0, None
    while not _all_ended(job):
        time.sleep(POLL_S)
        now = time.monotonic()
        if now - asked_s >= _POLL_SLURM_S:
            asked_s = now
            gone_s = (gone_s or now) if _is_gone(submitted) else None
        if gone_s is not None and now - gone_s > _LATE_S:
            job.tell_first(
                "failed", node=0, rank=0,
                hang=f"SLURM ended job {submitted.job_id}; its log is "
                f"{submitted.paths.stdout}",
            )  # fmt: skip
            return


def _is_gone(submitted: Any) -> bool:
    """Asked of squeue where there is one: sacct, which submitit asks, needs accounting."""
    if shutil.which("squeue") is None:
        return bool(submitted.done())
    asked = subprocess.run(
        ["squeue", "--noheader", "--format=%T", f"--jobs={submitted.job_id}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    # A job that it has forgotten is an error to squeue; so is a controller that is away.
    if asked.returncode != 0:
        return "Invalid job id" in asked.stderr
    return asked.stdout.strip() in ("", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def run_task(output: str) -> None:
    """On a node, as one task of the job."""
    import submitit

    job = load_job(output)
    with stops_by_signal(job, insist=False):
        run_node(job, submitit.JobEnvironment().global_rank)


def describe(job: Job, run: Run, options: Mapping[str, str]) -> str:
    """The batch script that sbatch would be given."""
    import_submitit()
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    names = {"timeout_min": "time", "name": "job_name"}
    told = {
        names.get(name, name.removeprefix("slurm_")): value
        for name, value in parameters(job, run, options).items()
    }
    folder = Path(job.output) / "slurm"
    python = options.get("python", shlex.quote(sys.executable))
    command = f"{python} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    known = SlurmExecutor._valid_parameters()
    text: str = _make_sbatch_string(
        command=command, folder=folder, **{k: v for k, v in told.items() if k in known}
    )
    return text
