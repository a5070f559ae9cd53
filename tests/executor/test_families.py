"""Protects families under layouts: every one trains, generates, moves and answers as one process.

One process is held against transformers in ``test_transformer`` (logits, losses, gradients) and
here (greedy answers, and logits of config files that leave fields out or add some). Shapes that
tp does not divide are among the cases: kv heads that several shards hold, and vocabularies of
which shards hold unlike parts.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from executor.batch import SequenceBatch
from executor.buffers import ParameterBuffer
from executor.context import RankContext, build_contexts, single_process
from executor.generate.engine import generate
from executor.generate.sampling import SamplingParams
from executor.model.attention import pack
from executor.model.hf_load import load
from executor.model.hf_save import save
from executor.model.transformer import DecoderStage
from executor.parallel.optimizer import Adam, AdamConfig
from executor.parallel.pipeline import train_1f1b
from executor.parallel.tensor import vocab_parallel_log_probs
from executor.reallocate import execute
from planner.layout import Layout, ParameterSlice
from planner.mesh import DeviceMesh
from planner.reallocation import reallocate
from planner.strategy import Recompute
from profiles.hf_config import read_hf_config
from profiles.models import ModelSpec
from tests.executor.small_models import (
    FAMILY_SPECS,
    hf_logits,
    hf_twin,
    random_buffer,
    random_ids,
    single_layout,
    single_stage,
    small_spec,
)
from tests.spawn import spawn

# Frequencies and windows are the same on every shard: one of each kind is enough here.
ALIKE = {"mistral", "llama linear", "llama yarn"}
SPECS: dict[str, ModelSpec] = {
    **{key: spec for key, spec in FAMILY_SPECS.items() if key not in ALIKE},
    "one kv head": small_spec(num_kv_heads=1, qkv_bias=True, family="qwen2"),
    "odd vocabulary": small_spec(vocab=61),
    "odd and tied": small_spec(vocab=61, tied_embedding=True, num_kv_heads=1),
    # Neither divides the other under tp 2: a shard repeats one of the kv heads that it holds.
    "three kv heads": small_spec(num_heads=6, num_kv_heads=3),
    "scalar": replace(FAMILY_SPECS["gpt2"], head="scalar", tied_embedding=False),
}
SPECS = {key: replace(spec, num_layers=2) for key, spec in SPECS.items()}
LENGTHS = (5, 9, 7)
LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "pp2 tp2": {"pp": 2, "tp": 2},
    "tp4": {"tp": 4},
    "ep2": {"dp": 2, "ep": 2},
    "tp2 ep2": {"tp": 2, "dp": 2, "ep": 2},
    "pp2 ep2": {"pp": 2, "dp": 2, "ep": 2},
    "dp4 ep2": {"dp": 4, "ep": 2},
}
NEW_TOKENS = 6
PROMPTS = (5, 9, 1)
GREEDY = SamplingParams(max_new_tokens=NEW_TOKENS, greedy=True)


def layouts_of(spec: ModelSpec) -> dict[str, Layout]:
    """Those that the model allows: heads and feed-forward columns divide by tp."""
    found = {}
    for name, axes in LAYOUTS.items():
        size = axes.get("tp", 1) * axes.get("pp", 1) * axes.get("dp", 1)
        tp = axes.get("tp", 1)
        if spec.num_experts % axes.get("ep", 1) or ("ep" in axes and not spec.num_experts):
            continue
        # Of four shards only what is new there: kv heads that shards share, one and two of them.
        if spec.num_heads % tp == 0 and (tp < 4 or spec.family == "qwen2"):
            found[name] = Layout(spec=spec, mesh=DeviceMesh(0, size), **axes)
    return found


def train_results(
    ctx: RankContext, *, recompute: Recompute = "none", sequence_parallel: bool = False
) -> dict[str, Any]:
    """(loss, gradients summed over the ranks that share them) of this rank."""
    spec = ctx.layout.spec
    buffer = random_buffer(ctx.layout, ctx.rank)
    gradients = torch.zeros_like(buffer.flat)
    stage = DecoderStage(
        ctx, buffer, gradients=gradients, recompute=recompute, sequence_parallel=sequence_parallel
    )
    ids = random_ids(spec, LENGTHS).split(LENGTHS)
    mine = range(ctx.dp_rank, len(LENGTHS), ctx.layout.dp)
    batches = [
        SequenceBatch(
            samples=(i,), lengths=(LENGTHS[i],), per_token={"sequences": ids[i]}, per_sequence={}
        )
        for i in mine
    ]
    # As many on every replica, as the worker has them: the last of some are empty.
    empty = SequenceBatch(
        samples=(), lengths=(), per_token={"sequences": ids[0][:0]}, per_sequence={}
    )
    batches += [empty] * (-(-len(LENGTHS) // ctx.layout.dp) - len(batches))
    scale = sum(LENGTHS)

    def loss(hidden: Tensor, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        out = stage.head(hidden)
        if spec.head == "lm":
            out = vocab_parallel_log_probs(out, batch.token_ids.roll(-1), ctx)
        weights = torch.arange(1.0, len(out) + 1)
        return (out * weights).sum() / scale, {}

    statistics = train_1f1b(stage, batches, loss=loss)
    # Not a step of Adam's, which hides the size of a gradient.
    adam = Adam(ctx, buffer, gradients, AdamConfig(lr=0.0), zero=0, partial=stage.partial)
    adam._reduce_gradients()
    losses = None
    if statistics is not None:
        losses = [float(found["loss"]) for found, own in zip(statistics, batches) if own.lengths]
    grads = {piece.name: buffer.view(piece.name, of=gradients) for piece in buffer.slices}
    return {"losses": losses, "grads": grads}


def answers(stage: DecoderStage, samples: tuple[int, ...]) -> dict[int, list[int]]:
    """Greedy tokens of some of the prompts."""
    prompts = random_ids(stage.spec, PROMPTS, seed=9).split(PROMPTS)
    batch = generate(
        stage, [prompts[i] for i in samples], samples=samples, params=GREEDY, seed=0, step=0,
        num_groups=2,
    )  # fmt: skip
    parts = batch.token_ids.split(list(batch.lengths))
    return {sample: part.tolist() for sample, part in zip(batch.samples, parts)}


def moved(src: Layout, dst: Layout, rank: int) -> dict[str, Tensor]:
    """This rank's slices of ``dst`` after a reallocation."""
    source = random_buffer(src, rank) if rank in src.mesh else None
    destination = None
    if rank in dst.mesh:
        destination = ParameterBuffer.for_rank(dst, rank, dtype=torch.float32, device="cpu")
    if source is not None or destination is not None:
        execute(reallocate(src, dst), source, destination, rank=rank, staging_bytes=2048)
    if destination is None:
        return {}
    return {piece.name: destination.view(piece.name) for piece in destination.slices}


def four_ranks(rank: int, world_size: int) -> dict[tuple[str, str], dict[str, Any]]:
    layouts = {key: layouts_of(spec) for key, spec in SPECS.items()}
    every = [layout for found in layouts.values() for layout in found.values()]
    contexts = build_contexts(every, rank=rank, device=torch.device("cpu"))
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for key, spec in SPECS.items():
        previous = single_layout(spec)
        for name, layout in layouts[key].items():
            result: dict[str, Any] = {"moved": moved(previous, layout, rank)}
            previous = layout
            if (ctx := contexts.get(layout)) is not None:
                result["whole tokens"] = train_results(ctx)
                if layout.ep > 1:
                    result["blocks again"] = train_results(ctx, recompute="full")
                if layout.tp > 1:
                    result["split tokens"] = train_results(
                        ctx, recompute="selective", sequence_parallel=True
                    )
                if spec.head == "lm":
                    stage = DecoderStage(ctx, random_buffer(layout, rank))
                    samples = tuple(range(ctx.dp_rank, len(PROMPTS), layout.dp))
                    result["answers"] = answers(stage, samples)
            found[key, name] = result
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[dict[tuple[str, str], dict[str, Any]]]:
    return spawn(4, four_ranks, timeout_s=300.0)


CASES = [(key, name) for key, spec in SPECS.items() for name in layouts_of(spec)]


def box(piece: ParameterSlice) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.length))


TRAINED = [(*case, "whole tokens") for case in CASES]
TRAINED += [(*case, "split tokens") for case in CASES if "tp" in case[1]]
TRAINED += [(*case, "blocks again") for case in CASES if "ep" in case[1]]


@pytest.mark.parametrize("key, name, how", TRAINED)
def test_losses_and_gradients_are_those_of_one_process(by_rank, key, name, how):
    spec = SPECS[key]
    layout = layouts_of(spec)[name]
    expected = train_results(single_process(single_layout(spec)))
    losses: list[float] = []
    for rank in layout.mesh.devices:
        result = by_rank[rank][key, name][how]
        pp_rank, _, tp_rank = layout.coordinates(rank)
        if pp_rank == layout.pp - 1 and tp_rank == 0:
            losses += result["losses"]
        pieces = {piece.name: piece for piece in layout.slices(rank)}
        assert result["grads"].keys() == pieces.keys()
        for parameter, grad in result["grads"].items():
            whole = expected["grads"][parameter]
            torch.testing.assert_close(
                grad, whole[box(pieces[parameter])], atol=2e-5 * float(whole.abs().max()) + 1e-6,
                rtol=1e-4, msg=lambda m, n=parameter: f"{n}: {m}",
            )  # fmt: skip
    assert sorted(losses) == pytest.approx(sorted(expected["losses"]), abs=1e-5)


@pytest.mark.parametrize("key, name", CASES)
def test_a_reallocation_brings_every_parameter(by_rank, key, name):
    spec = SPECS[key]
    layout, whole = layouts_of(spec)[name], random_buffer(single_layout(spec))
    for rank in layout.mesh.devices:
        found = by_rank[rank][key, name]["moved"]
        pieces = {piece.name: piece for piece in layout.slices(rank)}
        assert found.keys() == pieces.keys()
        for parameter, values in found.items():
            assert torch.equal(values, whole.view(parameter)[box(pieces[parameter])]), parameter


@pytest.mark.parametrize("key", [key for key, spec in SPECS.items() if spec.head == "lm"])
def test_greedy_answers_are_transformers_under_every_layout(by_rank, key):
    spec = SPECS[key]
    model = hf_twin(single_stage(spec))
    expected = {}
    for sample, prompt in enumerate(random_ids(spec, PROMPTS, seed=9).split(PROMPTS)):
        with torch.no_grad():
            row = model.generate(
                prompt[None], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None,
                pad_token_id=0, attention_mask=torch.ones_like(prompt[None]),
            )  # fmt: skip
        expected[sample] = row[0].tolist()
    for name, layout in layouts_of(spec).items():
        for rank in layout.mesh.devices:
            for sample, tokens in by_rank[rank][key, name]["answers"].items():
                assert tokens == expected[sample], (name, rank, sample)


# ---- what config.json says beside the sizes ---------------------------------------------------

SLIDES = {"use_sliding_window": True, "sliding_window": 4}
NO_SCALING = {"rope_parameters": None}
# A spec's config with other fields; None: left out.
EDITS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2, all slide": (
        "qwen2 tied",
        SLIDES | {"max_window_layers": 9, "layer_types": ["sliding_attention"] * 2},
    ),
    "qwen3, none slides": (
        "qwen3",
        SLIDES | {"max_window_layers": 0, "layer_types": ["full_attention"] * 2},
    ),
    "qwen2_moe, all slide": ("qwen2_moe", SLIDES | {"layer_types": ["sliding_attention"] * 2}),
    "qwen2_moe, by its own rule": ("qwen2_moe", SLIDES | {"max_window_layers": 0}),
    "qwen3_moe, without a rule": ("qwen3_moe", SLIDES | {"max_window_layers": 9}),
    "mistral, a field of Qwen's": ("odd vocabulary", {"use_sliding_window": False, **{
        "model_type": "mistral", "architectures": None, "sliding_window": 4}}),
    "yarn beside": ("odd vocabulary", NO_SCALING | {
        "rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32}),
    "llama3 beside": ("llama llama3", {"original_max_position_embeddings": 16}),
    "mixtral's epsilon": ("mixtral", {"rms_norm_eps": None}),
    "phi3's epsilon": ("phi3", {"rms_norm_eps": None}),
    "gpt2's epsilon": ("gpt2", {"layer_norm_epsilon": None}),
    "no epsilon": ("odd vocabulary", {"rms_norm_eps": 0.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_a_config_file_means_what_transformers_makes_of_it(tmp_path, name):
    """And what is saved of it, beside its source and without one, means the same again."""
    from transformers import AutoModelForCausalLM

    key, fields = EDITS[name]
    made = single_stage(SPECS[key])
    if "epsilon" in name:  # beside such small values one is seen
        for piece in made.buffer.slices:
            if piece.name in ("embedding.weight", "position.weight"):
                made.buffer.view(piece.name).mul_(1e-2)
    folder = tmp_path / "source"
    save(made.ctx, made.buffer, folder, made.spec)
    config = json.loads((folder / "config.json").read_text()) | fields
    for field in (field for field, value in fields.items() if value is None):
        del config[field]
    (folder / "config.json").write_text(json.dumps(config))

    spec = read_hf_config(folder)
    layout = single_layout(spec)
    buffer = ParameterBuffer.for_rank(layout, 0, dtype=torch.float32, device="cpu")
    load(buffer, folder, spec)
    stage = DecoderStage(single_process(layout), buffer)
    save(stage.ctx, buffer, tmp_path / "beside", spec, source_folder=folder)
    save(stage.ctx, buffer, tmp_path / "without", spec)
    ids = random_ids(spec, LENGTHS)
    with torch.no_grad():
        logits = stage.head(stage.forward(ids, pack(LENGTHS)))
        for found in (folder, tmp_path / "beside", tmp_path / "without"):
            model = AutoModelForCausalLM.from_pretrained(found, dtype=torch.float32).eval()
            expected = hf_logits(model, ids, LENGTHS)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
