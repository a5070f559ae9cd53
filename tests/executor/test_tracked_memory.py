"""Protects the memory model on CPUs: what real workers allocate in a real step, counted storage by
storage while they compute and send, is within a tenth of the planner's itemised estimate.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from executor.storage_count import StorageCount
from planner.memory import RESERVE_BYTES
from planner.plan import ExecutionPlan
from planner.plan_memory import plan_memory
from tests.runs import SMALL, make_plan, run_rank
from tests.spawn import spawn

# Wide enough that weights and activations are what counts, small enough for seconds.
WIDE = replace(
    SMALL, hidden=256, num_heads=8, num_kv_heads=4, head_dim=32, ffn=704, vocab=2048,
    max_positions=256,
)  # fmt: skip
SIZES = [
    "batch_size=8", "prompt_len=48", "response_len=12", "ppo.num_mini_batches=2", "init=random",
    "total_steps=1",
]  # fmt: skip
PLANS = {
    "dp": make_plan(2, "0:d2p1m1:1", spec=WIDE, overrides=SIZES, actor_train="0:d2p1m1:2:zero"),
    "tp": make_plan(2, "0:d1p1m2:1", spec=WIDE, overrides=SIZES, actor_train="0:d1p1m2:2:sp"),
    "pp": make_plan(
        2, "0:d1p2m1:2", spec=WIDE, overrides=SIZES, critic_train="0:d1p2m1:2:recompute"
    ),
    # Generation's weights come in every step, into memory that is kept.
    "moves": make_plan(2, "0:d1p1m2:1", spec=WIDE, overrides=SIZES, actor_gen="0:d2p1m1:1"),
    "views": make_plan(2, "0:d1p2m1:2", spec=WIDE, overrides=SIZES, actor_gen="0:d1p1m2:1"),
}  # fmt: skip


def peaks(rank: int, world_size: int, plans: dict[str, ExecutionPlan], folder: str) -> list[int]:
    found = []
    for name, plan in plans.items():
        own = Path(folder) / name
        own.mkdir(exist_ok=True)
        count = StorageCount()
        run_rank(rank, world_size, plan, str(own), around=count)
        found.append(max(count.peaks.values()))
    return found


def test_what_workers_allocate_is_what_the_planner_says(tmp_path: Path) -> None:
    by_rank = spawn(2, peaks, PLANS, str(tmp_path), timeout_s=120.0)
    errors = {}
    for index, (name, plan) in enumerate(PLANS.items()):
        for rank, found in enumerate(by_rank):
            planned = plan_memory(plan)[rank].total - RESERVE_BYTES["cpu"]
            errors[name, rank] = found[index] / planned - 1
    assert all(abs(error) < 0.10 for error in errors.values()), errors
