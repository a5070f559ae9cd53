"""Protects the ends that nobody wished for: each has its outcome, none leaves a process."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from executor.cli import main
from executor.launch import local
from executor.launch.job import Job
from executor.launch.supervise import WorkerError, holding, launch
from executor.results import DivergedError
from executor.run import Run, resolve
from executor.run_checkpoint import Checkpoint, finish, latest, make_partial
from executor.watchdog import Position, read_position
from executor.worker import Worker
from planner.program import Generate, Instruction, compile_plan
from profiles.errors import ConfigError
from tests.runs import make_plan

ARGUMENTS = (
    "run", "--layout", "d2p1m1", "--model", "tiny", "init=random", "batch_size=4", "prompt_len=4",
    "response_len=4", "total_steps=100000", "ppo.num_mini_batches=1",
)  # fmt: skip


def a_job(output: Path) -> Job:
    return Job(
        output=str(output), token="t", secret="", launcher="local", num_ranks=1, ranks_per_node=1,
        num_threads=1, hang_timeout_s=10.0, bind="", resume_from="", folder=str(output),
        python_path=(), config={},
    )  # fmt: skip


def descendants(pid: int) -> list[int]:
    """Processes that ``pid`` started, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def is_worker(pid: int) -> bool:
    return b"executor.launch.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()


def start(output: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "executor.cli", *ARGUMENTS, "-o", str(output), *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_a_step(process: subprocess.Popen[str], output: Path) -> None:
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no step in two minutes"
        time.sleep(0.2)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that has done its first step."""
    process = start(tmp_path / "out")
    wait_for_a_step(process, tmp_path / "out")
    yield process
    process.kill()
    process.wait()


def ends(process: subprocess.Popen[str], children: list[int]) -> tuple[int, str]:
    """(exit code, last line of stderr), once none of its processes is left."""
    _, printed = process.communicate(timeout=120)
    none_is_left(children)
    assert "Traceback" not in printed
    return process.returncode, printed.strip().splitlines()[-1]


def none_is_left(children: list[int], *, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while any(is_alive(pid) for pid in children):
        assert time.monotonic() < deadline, "processes are left over"
        time.sleep(0.1)


def none_works_for(output: Path) -> None:
    """No worker of this run is left, whoever its parent is."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = file.read_bytes().split(b"\0")
            assert str(output).encode() not in words, file


def is_alive(pid: int) -> bool:
    """Not ended, and not a zombie that waits for its parent."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_a_killed_worker_is_named(running: subprocess.Popen[str]) -> None:
    children = descendants(running.pid)
    os.kill([pid for pid in children if is_worker(pid)][-1], signal.SIGKILL)
    code, sentence = ends(running, children)
    assert code == 1
    assert "was ended by SIGKILL" in sentence


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_process_after_a_checkpoint(
    running: subprocess.Popen[str], number: signal.Signals, tmp_path: Path
) -> None:
    children = descendants(running.pid)
    running.send_signal(number)
    code, sentence = ends(running, children)
    assert code == 128 + number
    found = re.search(r"interrupted after step (\d+), with a checkpoint", sentence)
    assert found is not None, sentence
    newest = latest(tmp_path / "out" / "checkpoints")
    assert newest is not None
    assert Checkpoint(newest).step == int(found[1])
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(int(found[1])))


def test_a_killed_launcher_leaves_no_worker(running: subprocess.Popen[str]) -> None:
    children = descendants(running.pid)
    assert len([pid for pid in children if is_worker(pid)]) == 2
    running.kill()
    none_is_left(children)


def test_a_second_signal_does_not_wait_for_a_frozen_worker(
    running: subprocess.Popen[str], tmp_path: Path
) -> None:
    """The second after the first was seen: of two that wait for a busy machine the kernel keeps

    one, and then it is the next that ends the run.
    """
    children = descendants(running.pid)
    os.kill([pid for pid in children if is_worker(pid)][-1], signal.SIGSTOP)
    running.send_signal(signal.SIGINT)
    seen = tmp_path / "out" / "launch" / "stop.json"
    deadline = time.monotonic() + 60
    while not seen.exists():
        assert time.monotonic() < deadline, "the first signal was not heeded"
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    code, sentence = ends(running, children)
    assert code == 130
    assert sentence == "realexec: interrupted; there is no checkpoint to go on from"


def test_a_frozen_worker_is_named_with_its_instruction_and_who_waits(tmp_path: Path) -> None:
    limit_s = 5.0
    process = start(tmp_path, f"hang_timeout_s={limit_s}")
    try:
        wait_for_a_step(process, tmp_path)
        children = descendants(process.pid)
        (pid,) = [pid for pid in children if is_worker(pid) and "RANK=1" in environment(pid)]
        freeze_in_an_instruction(pid, tmp_path / "launch" / "heartbeat" / "rank00001.json")
        frozen_s = time.monotonic()
        code, sentence = ends(process, children)
        assert time.monotonic() - frozen_s < 2 * limit_s + 5
    finally:
        process.kill()
    assert code == 1
    assert "rank 1 on " in sentence
    assert "its process is stopped" in sentence
    told = r"hangs in [\w ]+ \(instruction \d+ of step \d+\): no sign of life for \d s"
    assert re.search(told, sentence), sentence
    assert re.search(r"rank 0 waits for it in [\w ]+ \(instruction", sentence), sentence


def test_logits_that_are_no_numbers_are_a_sentence_of_their_call() -> None:
    def generate(instruction: Instruction, counts: dict[str, int]) -> None:
        raise FloatingPointError("logits of sample 3 are not finite")

    step = compile_plan(make_plan(1, "0:d1p1m1:1")).step[0]
    instruction = next(i for i in step if isinstance(i, Generate))
    worker = cast(Worker, SimpleNamespace(handlers={Generate: generate}, turn=(4, 0)))
    told = r"actor_gen: logits of sample 3 are not finite \(step 5\); check the weights"
    with pytest.raises(DivergedError) as stop:
        Worker._handle(worker, instruction, {})
    assert re.match(told, str(stop.value))


def freeze_in_an_instruction(pid: int, heartbeat: Path) -> None:
    """Not between two steps, where a rank is in none."""
    while True:
        os.kill(pid, signal.SIGSTOP)
        position = read_position(heartbeat)
        if position is not None and position.index >= 0:
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)


def environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def test_a_loss_that_is_no_number_ends_the_run_before_its_checkpoint(tmp_path: Path) -> None:
    process = start(
        tmp_path, "actor.lr=1e30", "actor.max_grad_norm=0", "checkpoint_every=1", "total_steps=50"
    )
    code, sentence = ends(process, [])
    assert code == 2
    none_works_for(tmp_path)
    found = re.search(r"actor_train: \w+ is (nan|inf) in step (\d+); no checkpoint", sentence)
    assert found is not None, sentence
    assert "lower actor.lr" in sentence
    newest = latest(tmp_path / "checkpoints")
    assert (0 if newest is None else Checkpoint(newest).step) == int(found[2]) - 1


def test_memory_that_runs_out_is_told_with_call_rank_and_instruction(tmp_path: Path) -> None:
    reward = tmp_path / "greedy.py"
    reward.write_text(
        "import torch\n\n"
        "def reward(prompt, answer, record):\n    return torch.empty(1 << 50).sum()\n"
    )
    process = start(tmp_path / "out", f"reward.source={reward}:reward", "data.path=")
    code, sentence = ends(process, [])
    none_works_for(tmp_path / "out")
    assert code == 2, sentence
    told = (
        r"allocations\.rew_inf: rank \d ran out of memory in rew_inf "
        r"\(instruction \d+ of step 1\): estimated [\d.]+ MiB \(reserve .*"
        r"there was memory .*tried to allocate 4503599627370496"
    )
    assert re.search(told, sentence), sentence


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True,
        text=True,
    )  # fmt: skip
    if mounted.returncode != 0:
        pytest.skip(f"tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(small_disk: Path) -> None:
    process = start(small_disk, "checkpoint_every=1", "keep_checkpoints=100", "total_steps=100")
    code, sentence = ends(process, [])
    none_works_for(small_disk)
    assert code == 2
    assert "could not be written" in sentence or "no room is left" in sentence
    newest = latest(small_disk / "checkpoints")
    assert newest is not None
    assert Checkpoint(newest).step >= 1
    assert not list((small_disk / "checkpoints").glob(".*"))


def test_status_logs_and_stop_of_a_run(
    running: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    children, output = descendants(running.pid), str(tmp_path / "out")
    assert main(["status", output]) == 0
    told = capsys.readouterr().out
    assert told.startswith("local: running\n")
    assert len(re.findall(r"\d s ago +\w+", told)) == 2
    assert main(["stop", output]) == 0
    assert re.match(r"stopped after step \d+\n", capsys.readouterr().out)
    code, _ = ends(running, children)
    assert code == 128 + signal.SIGTERM
    assert main(["logs", output]) == 0
    told = capsys.readouterr().out
    assert told.index("rank00000.log") < told.index("step 1/") < told.index("rank00001.log")
    assert main(["logs", output, "--rank", "7"]) == 2
    assert main(["stop", output]) == 0
    assert "it has ended: stopped after step" in capsys.readouterr().out
    assert main(["status", str(tmp_path)]) == 2


def test_a_run_whose_launcher_was_killed_long_ago_is_lost(
    running: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    children, output = descendants(running.pid), tmp_path / "out"
    running.kill()
    none_is_left(children)
    for file in (output / "launch").rglob("*.json"):
        os.utime(file, (0, 0))
    for verb in ("status", "stop"):
        assert main([verb, str(output)]) == 0
        assert "lost: no rank has given a sign of life" in capsys.readouterr().out


def test_a_second_run_does_not_start_in_the_folder_of_one_that_goes_on(
    running: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    children, output = descendants(running.pid), tmp_path / "out"
    before = (output / "launch" / "job.json").read_text()
    assert main([*ARGUMENTS, "-o", str(output)]) == 2
    told = f"output {output}: a run goes on here; end it with realexec stop {output}, or"
    assert told in capsys.readouterr().err
    assert (output / "launch" / "job.json").read_text() == before
    assert running.poll() is None
    running.kill()
    none_is_left(children)
    with holding(output):  # not any more, although ranks were heard a moment ago
        pass


@pytest.mark.parametrize("launcher, has_locks", [("slurm", True), ("local", False)])
def test_ranks_that_nobody_holds_a_lock_for_are_heard(
    launcher: str, has_locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM's go on without who has submitted them; and some file systems have no locks."""

    def no_locks(file: object, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    job = replace(a_job(tmp_path), launcher=launcher)
    job.save(make_plan(1, "0:d1p1m1:1"))
    beat = job.heartbeat_of(0)
    beat.write_text("{}")
    if not has_locks:
        monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(ConfigError, match="a run goes on here"), holding(tmp_path):
        pass
    os.utime(beat, (0, 0))
    with holding(tmp_path):  # it is lost
        pass
    beat.touch()
    job.tell("node0", codes={})
    with holding(tmp_path):  # it has ended
        pass


@pytest.mark.parametrize(
    "failed_at, checkpoints, starts",
    [
        ((3, 3, 3, 3), (), 2),
        ((3, 4, 4, 5), (), 3),
        ((3, 3, 3, 3), (1, 2, 3), 4),
        ((1, 2, 3, 4), (), 4),
    ],
)
def test_what_fails_alike_at_one_place_is_not_tried_again(
    failed_at: Sequence[int], checkpoints: Sequence[int], starts: int, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """``checkpoints``: after the first start, after the second …"""
    begun: list[Path | None] = []

    def fails(job: Job, run: Run, options: Mapping[str, str]) -> None:
        begun.append(run.resume_from)
        step = failed_at[len(begun) - 1]
        position = Position(rank=0, step=step, turn=0, index=1, label="rew_inf")
        job.heartbeat_of(0).write_text(json.dumps(asdict(position)))
        job.tell_first("failed", node=0, rank=0, hang="rank 0 is of no use")
        if len(begun) <= len(checkpoints):
            make_partial(tmp_path / "checkpoints", checkpoints[len(begun) - 1])
            finish(tmp_path / "checkpoints", checkpoints[len(begun) - 1], {})

    run = resolve(make_plan(1, "0:d1p1m1:1"), [f"output={tmp_path}"])
    with pytest.raises(WorkerError, match="of no use"):
        launch(run, fails, max_restarts=3)
    assert len(begun) == starts
    assert ("not restarted" in caplog.text) == (starts < 4)


def test_nothing_listens_beyond_the_interface_that_was_chosen(
    running: subprocess.Popen[str], tmp_path: Path
) -> None:
    own = set()
    for pid in [running.pid, *descendants(running.pid)]:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                own.add(os.readlink(link))
    listening = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            is_open = fields[3] == "0A" if table.startswith("tcp") else fields[2].endswith(":0000")
            if is_open and f"socket:[{fields[9]}]" in own:
                listening.append(fields[1].partition(":")[0])
    job = tmp_path / "out" / "launch" / "job.json"
    assert (job.stat().st_mode & 0o777, job.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert len(listening) >= 2  # the store and gloo
    assert set(listening) == {"0100007F"}  # 127.0.0.1


def test_a_dry_run_prints_every_rank_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARGUMENTS, "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["RANK=0", "RANK=1"]
    assert all("executor.launch.worker" in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main([*ARGUMENTS, "-o", str(tmp_path / "file")]) == 2
    assert "file: cannot be written (File exists); name a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_an_option_of_another_launcher_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--set", "partition=gpu"]) == 2
    assert "local has no option 'partition'" in capsys.readouterr().err


def test_an_agent_is_told_of_signals_without_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception of a handler within ``Popen.poll`` leaves its lock taken: the ``wait`` of the

    kill that follows never ended. Here signals come as soon as the lock is taken.
    """
    (tmp_path / "launch").mkdir()
    job = a_job(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    lock = child._waitpid_lock  # type: ignore[attr-defined]
    seen: list[int] = []

    def strike(frame: object, event: str, function: object) -> None:
        if event == "c_return" and getattr(function, "__name__", "") == "acquire" and lock.locked():
            signal.raise_signal(signal.SIGINT)

    def node(job: Job, number: int, *, signals: Sequence[int]) -> None:
        sys.setprofile(strike)
        try:
            child.poll()
            child.poll()
        finally:
            sys.setprofile(None)
        seen.extend(signals)

    monkeypatch.setattr(local, "run_node", node)
    try:
        local.start(job, cast(Run, None), {})
        assert len(seen) >= 2
        assert job.told("stop") is not None
        assert not lock.locked()
    finally:
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
