"""Real processes over gloo for the tests of anything distributed.

``spawn(world_size, fn, *args)`` runs the module-level function ``fn(rank, world_size, *args)`` in
``world_size`` processes that share a process group, and returns the results by rank. A child's
exception is raised here with its traceback; children that hang are ended at the time limit.
"""

from __future__ import annotations

import faulthandler
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    """On which nothing listened just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(
    rank: int, world_size: int, port: int, folder: str, timeout_s: float, fn: Any, args: Any
) -> None:
    torch.set_num_threads(1)
    result: tuple[bool, Any]
    stacks = Path(folder, f"{rank}.stack").open("w")  # noqa: SIM115 open until the process ends
    faulthandler.dump_traceback_later(0.9 * timeout_s, file=stacks)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        result = (True, fn(rank, world_size, *args))
        dist.barrier()
    except BaseException:
        result = (False, traceback.format_exc())
    Path(folder, f"{rank}.tmp").write_bytes(pickle.dumps(result))
    Path(folder, f"{rank}.tmp").rename(Path(folder, f"{rank}.pickle"))
    if dist.is_initialized():
        dist.destroy_process_group()


def spawn(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Results of ``fn`` by rank.

    Raises:
        AssertionError: a child raised (its traceback is the message) or outlived ``timeout_s``.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        children = [
            context.Process(
                target=_child, args=(rank, world_size, port, folder, timeout_s, fn, args)
            )
            for rank in range(world_size)
        ]
        for child in children:
            child.start()
        deadline = time.monotonic() + timeout_s
        for child in children:
            child.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, child in enumerate(children) if child.is_alive()]
        for child in children:
            if child.is_alive():
                child.kill()
                child.join()
        stacks = "\n".join(f"rank {r}:\n{Path(folder, f'{r}.stack').read_text()}" for r in hung)
        results: dict[int, tuple[bool, Any]] = {}
        for rank in range(world_size):
            file = Path(folder, f"{rank}.pickle")
            if file.exists():
                results[rank] = pickle.loads(file.read_bytes())
    failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in results.items() if not ok]
    # The first failure is the cause; peers of a dead rank fail with broken connections.
    failures.sort(key=lambda text: "Connection" in text or "peer" in text)
    assert not failures, failures[0] + f"\n({len(failures)} of {world_size} ranks failed)"
    assert not hung, f"ranks {hung} still ran after {timeout_s} s\n{stacks}"
    assert len(results) == world_size, (
        f"ranks {set(range(world_size)) - set(results)} died silently"
    )
    return [results[rank][1] for rank in range(world_size)]
