"""Small models for the executor's tests: shapes, stages with random weights, and their oracles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from executor.buffers import ParameterBuffer
from executor.context import RankContext, single_process
from executor.model.families import hf_config, hf_name
from executor.model.random_weights import init_random
from executor.model.transformer import DecoderStage
from planner.layout import Layout, parameters
from planner.mesh import DeviceMesh
from profiles.models import ModelSpec

LENGTHS = (5, 9, 5, 1, 7)


def small_spec(**changes: Any) -> ModelSpec:
    """3 blocks, 4 heads over 2 kv heads, a head size that is not hidden / heads."""
    shape: dict[str, Any] = {
        "name": "small", "num_layers": 3, "hidden": 24, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 8, "ffn": 40, "vocab": 64, "rope_theta": 500.0,
    }  # fmt: skip
    return ModelSpec(**{**shape, **changes})


def single_layout(spec: ModelSpec) -> Layout:
    return Layout(spec=spec, mesh=DeviceMesh(0, 1))


def random_buffer(
    layout: Layout, rank: int = 0, *, seed: int = 7, **kwargs: Any
) -> ParameterBuffer:
    """Weights large enough that every part of a block matters; biases and norms random as well."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", **kwargs}
    buffer = ParameterBuffer.for_rank(layout, rank, **options)
    init_random(buffer, layout.spec, seed, std=0.3)
    for place, whole in enumerate(parameters(layout.spec)):
        if whole.name in buffer.by_name and len(whole.shape) == 1:
            noise = torch.randn(whole.shape, generator=torch.Generator().manual_seed(place))
            piece = buffer.by_name[whole.name]
            end = piece.offset[0] + piece.length[0]
            buffer.view(whole.name).add_(0.3 * noise[piece.offset[0] : end])
    return buffer


def single_stage(spec: ModelSpec, *, train: bool = False, recompute: bool = False) -> DecoderStage:
    """The whole model in this process."""
    layout = single_layout(spec)
    buffer = random_buffer(layout)
    gradients = torch.zeros_like(buffer.flat) if train else None
    return DecoderStage(single_process(layout), buffer, gradients=gradients, recompute=recompute)


def stage_place(layout: Layout, rank: int) -> RankContext:
    """A rank's place without groups: for a stage of tp 1, which never communicates."""
    assert layout.tp == 1
    return RankContext(layout=layout, rank=rank, device=torch.device("cpu"))


def random_ids(spec: ModelSpec, lengths: Sequence[int] = LENGTHS, seed: int = 3) -> Tensor:
    """[tokens]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, spec.vocab, (sum(lengths),), generator=generator)


def hf_twin(stage: DecoderStage) -> Any:
    """transformers' model with the weights of a single stage: the oracle of our decoder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    spec = stage.spec
    fields = hf_config(spec)
    config = AutoConfig.for_model(
        fields.pop("model_type"), **fields, tie_word_embeddings=spec.tied_embedding
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    own = dict(model.named_parameters())
    names = {hf_name(piece.name, spec): piece.name for piece in stage.buffer.slices}
    assert own.keys() == names.keys(), own.keys() ^ names.keys()
    with torch.no_grad():
        for theirs, ours in names.items():
            own[theirs].copy_(stage.buffer.view(ours))
    return model


def hf_logits(model: Any, ids: Tensor, lengths: Sequence[int] = LENGTHS) -> Tensor:
    """Each sequence by itself, without padding -> [tokens, vocab]."""
    return torch.cat([model(part[None]).logits[0] for part in ids.split(list(lengths))])
