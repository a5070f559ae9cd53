"""Protects everyone who edits a file by hand or has half of one: whatever is in it, the command
lines and loaders end soon, in one sentence, and with success only where the file is whole.

Cases follow from their number alone: ``run_case(kind, number)`` repeats one.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml

from executor import run_checkpoint
from executor.cli import main as realexec
from executor.records import read_examples
from executor.run_checkpoint import Checkpoint
from planner.cli import main as realplan
from planner.cluster_file import load_cluster
from planner.plan_schema import dumps, plan_to_dict
from profiles.catalogue import MODELS
from profiles.clusters import make_cluster
from profiles.errors import UserError
from profiles.hf_config import hf_config, read_hf_config
from profiles.table import CostTable
from tests.fuzz.mutations import (
    Path as Place,
)
from tests.fuzz.mutations import (
    damage_text,
    is_broken,
    mutate_json,
    mutate_lines,
    parse,
)
from tests.profiles.test_calibration import calibration
from tests.profiles.test_table import make_table
from tests.runs import make_plan

TIME_LIMIT_S = 30
PLAN = plan_to_dict(make_plan(2, "0:d2p1m1:1", actor_gen="0:d1p1m2:1", critic_inf="1:d1p1m1:1"))
PROFILE = json.loads(json.dumps(replace(make_table(), calibration=calibration()).to_dict()))
CLUSTER = make_cluster("a100", 8).to_dict()
HF_CONFIG = hf_config(MODELS["llama-7b"])
PROMPTS = "".join(
    json.dumps({"id": n, "prompt": f"Question {n}?", "answer": "4", "tags": ["a", "b"]}) + "\n"
    for n in range(4)
)
PAIRS = "".join(
    json.dumps({"prompt": "1 + 1", "pos_answers": ["2"], "neg_answers": ["3"]}) + "\n"
    for n in range(3)
)
# Whatever these hold is the business of an algorithm or of people.
FREE_OF_PLAN = ("config", "provenance", "baselines", "estimate", "paths")


@dataclass(frozen=True)
class Outcome:
    """How a reader took a file: ``accepted``, or refused in a sentence."""

    accepted: bool
    told: str


class TooLongError(Exception):
    """A reader did not come back within ``TIME_LIMIT_S``."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLongError

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(TIME_LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def by_command(main: Callable[[Sequence[str]], int], *words: str) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(words))
        except SystemExit as exit_:  # argparse
            code = int(exit_.code or 0)
    printed = err.getvalue()
    assert code in (0, 2), f"exit code {code}: {printed[-2000:]}"
    assert "Traceback" not in printed, printed[-2000:]
    assert code == 0 or printed.strip(), "refused without a word"
    return Outcome(code == 0, printed)


def by_loader(load: Callable[[], object]) -> Outcome:
    try:
        load()
    except UserError as error:
        return Outcome(False, str(error))
    return Outcome(True, "")


# ---- kinds of files ---------------------------------------------------------------------------

Case = tuple[Outcome, bool]  # how it was taken, whether it is broken


def plan_case(folder: Path, rng: random.Random) -> Case:
    file = folder / "plan.json"
    file.write_bytes(mutate_json(dumps(PLAN), rng))
    page = str(folder / "page.html")
    commands: Sequence[tuple[Any, ...]] = (
        (realplan, "show", str(file)),
        (realplan, "show", str(file), "--rank", "0"),
        (realplan, "estimate", str(file), "--json"),
        (realplan, "explain", str(file)),
        (realplan, "compare", str(file), str(file)),
        (realplan, "report", str(file), "-o", page),
        (realexec, "run", str(file), "--dry-run", "-o", str(folder / "out")),
    )
    outcome = by_command(*rng.choice(commands))
    whole, found = parse(file.read_bytes())
    free = lambda at: bool(at) and at[0] in FREE_OF_PLAN  # noqa: E731
    return outcome, not whole or is_broken(json.loads(json.dumps(PLAN)), found, free=free)


def profile_case(folder: Path, rng: random.Random) -> Case:
    file = folder / "profile.json"
    file.write_bytes(mutate_json(json.dumps(PROFILE), rng))
    plan = folder / "sound.json"
    plan.write_text(dumps(PLAN))
    if rng.random() < 0.5:
        outcome = by_command(realplan, "estimate", str(plan), "--profile", str(file))
    else:
        outcome = by_loader(lambda: CostTable.load(file))
    whole, found = parse(file.read_bytes())

    # A table's rows have texts, numbers or nothing in a column, as the component has it; what was
    # seen once has no interval.
    def free(at: Place) -> bool:
        own = at[:1] in (("rows",), ("columns",)) or "versions" in at
        return own or at[-1:] in (("low",), ("high",), ("spread",))

    return outcome, not whole or is_broken(PROFILE, found, free=free)


def cluster_case(folder: Path, rng: random.Random) -> Case:
    file = folder / "cluster.yaml"
    if rng.random() < 0.5:
        file.write_bytes(mutate_json(json.dumps(CLUSTER), rng))
    else:
        file.write_bytes(damage_text(yaml.safe_dump(CLUSTER).encode(), rng))
    if rng.random() < 0.05:
        words = ("baselines", "--model", "tiny", "--gpus", "2", "batch_size=4")
        outcome = by_command(realplan, *words, "--cluster", str(file))
    else:
        outcome = by_loader(lambda: load_cluster(file))
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        return outcome, True
    # Name, number of nodes and sources may be absent; numbers may be texts with a unit.
    return outcome, not isinstance(found, dict) or not set(found) <= {*CLUSTER, "base"}


def data_case(folder: Path, rng: random.Random) -> Case:
    kind, text = rng.choice((("prompts", PROMPTS), ("answers", PROMPTS), ("pairs", PAIRS)))
    file = folder / "data.jsonl"
    file.write_bytes(mutate_lines(text, rng))
    outcome = by_loader(lambda: read_examples(file, kind))
    return outcome, any(_is_broken_line(line) for line in file.read_bytes().split(b"\n"))


def _is_broken_line(line: bytes) -> bool:
    """An object with a prompt is asked of every line that is not empty."""
    if not line.strip():
        return False
    whole, found = parse(line)
    if not whole or not isinstance(found, dict):
        return True
    return not isinstance(found.get("prompt"), str | list)


NEEDED_OF_HF = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


def hf_config_case(folder: Path, rng: random.Random) -> Case:
    file = folder / "config.json"
    file.write_bytes(mutate_json(json.dumps(HF_CONFIG), rng))
    if rng.random() < 0.05:
        words = ("baselines", "--gpus", "8", "batch_size=8", "--device", "h100")
        outcome = by_command(realplan, *words, "--model", str(file))
    else:
        outcome = by_loader(lambda: read_hf_config(file))
    whole, found = parse(file.read_bytes())
    if not whole or not isinstance(found, dict):
        return outcome, True
    values = [found.get(name) for name in NEEDED_OF_HF]
    return outcome, not all(type(v) in (int, float) and v == v and v >= 1 for v in values)


SPAN = {
    "rank": 0, "step": 1, "index": 3, "kind": "train", "label": "actor_train", "start_s": 1e9 + 1.0,
    "end_s": 1e9 + 2.0, "num_bytes": 0, "num_tokens": 7, "peak_bytes": 10,
}  # fmt: skip


def trace_case(folder: Path, rng: random.Random) -> Case:
    """A run's output folder, one line of whose trace is damaged."""
    run, profile, plan = folder / "run", folder / "calibrated.json", folder / "run" / "plan.json"
    (run / "trace").mkdir(parents=True, exist_ok=True)
    plan.write_text(dumps(PLAN))
    (folder / "sound_profile.json").write_text(json.dumps(PROFILE))
    spans = [{**SPAN, "step": step, "start_s": 1e9 + step, "end_s": 1e9 + step + 0.5} for step in
             range(3)]  # fmt: skip
    text = "".join(json.dumps(span) + "\n" for span in spans)
    file = run / "trace" / "rank0.jsonl"
    file.write_bytes(mutate_lines(text, rng))
    if rng.random() < 0.5:
        words = ("calibrate", str(folder / "sound_profile.json"), str(run), "-o", str(profile))
    else:
        words = ("report", str(plan), "--trace", str(profile), "--run", str(run))
    outcome = by_command(realplan, *words)
    return outcome, any(_is_no_span(line) for line in file.read_bytes().split(b"\n")[:-1])


def _is_no_span(line: bytes) -> bool:
    whole, found = parse(line)
    if not whole or not isinstance(found, dict):
        return True
    # Counts may be absent.
    return is_broken(SPAN, {**dict.fromkeys(list(SPAN)[7:], 0), **found}, free=lambda at: False)


WORDS = (
    "batch_size=8", "ppo.kl_coef=0.1", "actor.lr=1e-5", "total_steps=3", "seed=2", "init=random",
    "generation.top_p=0.9", "output=runs/x", "ppo.num_mini_batches=2", "actor.schedule=linear",
)  # fmt: skip


def words_case(folder: Path, rng: random.Random) -> Case:
    """Options on the command line; the files are whole."""
    plan = folder / "sound.json"
    plan.write_text(dumps(PLAN))
    word = damage_text(rng.choice(WORDS).encode(), rng).decode("utf-8", "replace")
    word = word.replace("\0", "") or "="
    output = str(folder / "out")
    return by_command(realexec, "run", str(plan), "--dry-run", "-o", output, "--", word), False


def checkpoint_case(folder: Path, rng: random.Random) -> Case:
    step = folder / "step00000002"
    step.mkdir(exist_ok=True)
    header = {
        "schema": run_checkpoint.SCHEMA, "version": run_checkpoint.VERSION, "step": 2,
        "algorithm": "ppo", "fixed": {}, "models": {}, "optimizers": {}, "functions": {},
        "files": {"actor.weight.rank00000.safetensors": 8},
    }  # fmt: skip
    (step / "actor.weight.rank00000.safetensors").write_bytes(b"\0" * 8)
    file = step / run_checkpoint.HEADER_FILE
    file.write_bytes(mutate_json(json.dumps(header), rng))
    if rng.random() < 0.3:
        plan = folder / "sound.json"
        plan.write_text(dumps(PLAN))
        words = ("--dry-run", "-o", str(folder / "out"), f"resume={step}", "init=random")
        outcome = by_command(realexec, "run", str(plan), *words)
    else:
        outcome = by_loader(lambda: Checkpoint(step))
    whole, found = parse(file.read_bytes())
    needed = ("schema", "version", "step", "files")
    return outcome, not whole or not isinstance(found, dict) or any(n not in found for n in needed)


def job_case(folder: Path, rng: random.Random) -> Case:
    """What a run has left of itself, read by ``status``."""
    launch = folder / "out" / "launch"
    launch.mkdir(parents=True, exist_ok=True)
    job = {
        "output": str(folder / "out"), "token": "t", "secret": "00", "launcher": "local",
        "num_ranks": 2, "ranks_per_node": 2, "num_threads": 1, "hang_timeout_s": 10.0,
        "bind": "lo", "resume_from": "", "folder": str(folder), "python_path": [], "config": {},
    }  # fmt: skip
    file = launch / "job.json"
    file.write_bytes(mutate_json(json.dumps(job), rng))
    outcome = by_command(realexec, rng.choice(("status", "logs")), str(folder / "out"))
    whole, found = parse(file.read_bytes())
    free: Callable[[Place], bool] = lambda at: at[:1] in (("config",), ("python_path",))  # noqa: E731
    return outcome, not whole or is_broken(job, found, free=free)


KINDS: Sequence[tuple[str, int, Callable[[Path, random.Random], Case]]] = (
    # (name, cases of 2,000, reader)
    ("plan", 800, plan_case),
    ("trace", 100, trace_case),
    ("profile", 250, profile_case),
    ("cluster", 250, cluster_case),
    ("data", 200, data_case),
    ("hf_config", 150, hf_config_case),
    ("words", 100, words_case),
    ("checkpoint", 100, checkpoint_case),
    ("job", 50, job_case),
)


def run_case(kind: str, number: int, folder: Path) -> str | None:
    """What is wrong with how case ``number`` was taken; None if nothing is."""
    reader = next(reader for name, _, reader in KINDS if name == kind)
    rng = random.Random(f"{kind} {number}")
    try:
        with limited():
            outcome, broken = reader(folder, rng)
    except TooLongError:
        return f"{kind} {number}: no answer after {TIME_LIMIT_S} s\n{traceback.format_exc()[-900:]}"
    except Exception:
        return f"{kind} {number}: {traceback.format_exc()[-1500:]}"
    if broken and outcome.accepted:
        return f"{kind} {number}: a broken file was accepted"
    return None


def run_cases(folder: Path, *, share: float) -> tuple[int, list[str]]:
    count, failures = 0, list[str]()
    for kind, total, _ in KINDS:
        for number in range(round(total * share)):
            count += 1
            failure = run_case(kind, number, folder)
            if failure is not None:
                failures.append(failure)
    return count, failures


def test_two_hundred_damaged_files(tmp_path: Path) -> None:
    count, failures = run_cases(tmp_path, share=0.1)
    assert count == 200
    assert not failures, f"{len(failures)} of {count}:\n" + "\n\n".join(failures[:10])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_thousand_damaged_files(tmp_path: Path) -> None:
    count, failures = run_cases(tmp_path, share=1.0)
    assert count == 2000
    assert not failures, f"{len(failures)} of {count}:\n" + "\n\n".join(failures[:10])


def test_sound_files_are_accepted(tmp_path: Path) -> None:
    """The oracle and the bases: nothing here is refused before it is damaged."""
    plan = tmp_path / "plan.json"
    plan.write_text(dumps(PLAN))
    assert by_command(realplan, "show", str(plan)).accepted
    out = str(tmp_path / "o")
    assert by_command(realexec, "run", str(plan), "--dry-run", "-o", out).accepted
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(PROFILE))
    assert by_command(realplan, "estimate", str(plan), "--profile", str(profile)).accepted
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(yaml.safe_dump(CLUSTER))
    assert asdict(load_cluster(cluster)) == CLUSTER
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    assert read_hf_config(tmp_path / "config.json").hidden == MODELS["llama-7b"].hidden
    for kind, text in (("prompts", PROMPTS), ("answers", PROMPTS), ("pairs", PAIRS)):
        (tmp_path / "d.jsonl").write_text(text)
        assert read_examples(tmp_path / "d.jsonl", kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["", "{", '{"schema": "realplan-plan"}', "\x00\x01"])
@pytest.mark.parametrize("program", ["planner.cli show", "executor.cli run"])
def test_in_a_process_of_its_own(program: str, damage: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(damage)
    done = subprocess.run(
        [sys.executable, "-m", *program.split(), str(file)], capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert str(file) in done.stderr
    assert "Traceback" not in done.stderr
