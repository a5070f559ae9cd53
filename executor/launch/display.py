"""What whoever starts a run sees of it: rank 0's log as it grows, and at a terminal where it is.

Read from files, so that it is the same under every launcher.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from executor.launch.job import Job
from executor.watchdog import read_position

_LOOK_S = 0.2


class _Follower:
    """Copies what is added to a file to stderr, until a rank has left the reason of its end."""

    def __init__(self, file: Path, errors: Path, console: Console) -> None:
        self.file = file
        self.errors = errors
        self.console = console
        self.offset = file.stat().st_size if file.exists() else 0

    def copy(self) -> None:
        if not self.file.exists():
            return
        with self.file.open("rb") as log:
            log.seek(self.offset)
            added = log.read()
        whole = added[: added.rfind(b"\n") + 1]  # a line that is still being written waits
        self.offset += len(whole)
        text = whole.decode(errors="replace")
        if text and not any(self.errors.glob("*.json")):
            self.console.out(text, end="", highlight=False)


@contextmanager
def showing(job: Job, total_steps: int) -> Iterator[None]:
    """While the body runs, stderr has rank 0's log and at a terminal a bar of steps."""
    console = Console(stderr=True, file=sys.stderr)
    progress = Progress(
        TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=24),
        TimeElapsedColumn(), TextColumn("{task.description}"), console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip
    task = progress.add_task("starting", total=total_steps)
    follower, ended = (
        _Follower(job.log_of(0), Path(job.output) / "errors", console),
        threading.Event(),
    )

    def look() -> None:
        follower.copy()
        position = read_position(job.heartbeat_of(0))
        if position is not None:
            progress.update(task, completed=max(0, position.step), description=position.label)

    def keep_looking() -> None:
        while not ended.wait(_LOOK_S):
            look()

    thread = threading.Thread(target=keep_looking, name="display", daemon=True)
    with progress:
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            look()
