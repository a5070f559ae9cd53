"""Greedy answers to chat prompts, beside transformers' ``generate()`` and beside vLLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from executor.batch import SequenceBatch
from executor.buffers import ParameterBuffer
from executor.context import single_process
from executor.generate.engine import generate
from executor.generate.sampling import SamplingParams
from executor.generate.vllm import VLLM
from executor.model import hf_load
from executor.model.transformer import DecoderStage
from executor_benches.questions import PROMPTS
from executor_benches.turns import WORLD, Row, take_turns
from planner.layout import Layout
from planner.mesh import DeviceMesh
from profiles.catalogue import resolve_model

NEW_TOKENS = 64


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
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False,
        )
        for prompt in PROMPTS
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
