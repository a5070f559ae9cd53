"""Small models for the executor's tests: shapes, stages with random weights, and their oracles."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from executor.buffers import ParameterBuffer
from executor.context import RankContext, single_process
from executor.model.hf_load import load
from executor.model.hf_save import save
from executor.model.random_weights import init_random
from executor.model.transformer import DecoderStage
from planner.layout import Layout, parameters
from planner.mesh import DeviceMesh
from planner.strategy import Recompute
from profiles.models import ModelSpec, RopeScaling

LENGTHS = (5, 9, 5, 1, 7)


def small_spec(**changes: Any) -> ModelSpec:
    """3 blocks, 4 heads over 2 kv heads, a head size that is not hidden / heads."""
    shape: dict[str, Any] = {
        "name": "small", "num_layers": 3, "hidden": 24, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 8, "ffn": 40, "vocab": 64, "rope_theta": 500.0,
    }  # fmt: skip
    return ModelSpec(**{**shape, **changes})


SCALINGS = {
    "linear": RopeScaling(kind="linear", factor=4.0),
    "llama3": RopeScaling(kind="llama3", factor=8.0, original_positions=32),
    "yarn": RopeScaling(kind="yarn", factor=4.0, original_positions=32),
}

# One of each family, with the family's switches and shapes that no two parameters share.
FAMILY_SPECS: dict[str, ModelSpec] = {
    "mistral": small_spec(family="mistral"),
    "mistral window": small_spec(family="mistral", sliding_window=4),
    "qwen2 tied": small_spec(family="qwen2", qkv_bias=True, tied_embedding=True),
    "qwen3": small_spec(family="qwen3", qk_norm=True, norm_eps=1e-6),
    **{f"llama {name}": small_spec(rope_scaling=scaling) for name, scaling in SCALINGS.items()},
    "llama biases": small_spec(qkv_bias=True, o_bias=True, ffn_bias=True),
    "gemma": small_spec(
        family="gemma", norm="rms_plus_one", activation="gelu_tanh", scaled_embedding=True,
        tied_embedding=True, num_kv_heads=1,
    ),
    "gpt2": small_spec(
        family="gpt2", norm="layer", positions="learned", max_positions=48, gated=False,
        activation="gelu_tanh", qkv_bias=True, o_bias=True, ffn_bias=True, tied_embedding=True,
        hidden=32, num_kv_heads=4, rope_theta=10000.0,
    ),
    "phi3": small_spec(family="phi3", hidden=32, sliding_window=6),
    "mixtral": small_spec(family="mixtral", num_experts=4, experts_per_token=2),
    "qwen2_moe": small_spec(
        family="qwen2_moe", qkv_bias=True, num_experts=6, experts_per_token=3,
        normalize_top_k=False, shared_ffn=56,
    ),
    "qwen3_moe": small_spec(
        family="qwen3_moe", qk_norm=True, num_experts=8, experts_per_token=2, tied_embedding=True
    ),
}  # fmt: skip


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


def single_stage(
    spec: ModelSpec, *, train: bool = False, recompute: Recompute = "none"
) -> DecoderStage:
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
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save(stage.ctx, stage.buffer, folder, stage.spec)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    # It makes up what it does not find, and drops what it does not know.
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def hf_gradients(model: Any, spec: ModelSpec) -> ParameterBuffer:
    """The gradients of transformers' model under our names: it writes them as a checkpoint."""
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    buffer = ParameterBuffer.for_rank(single_layout(spec), 0, dtype=torch.float32, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        load(buffer, folder, spec)
    return buffer


def hf_logits(model: Any, ids: Tensor, lengths: Sequence[int] = LENGTHS) -> Tensor:
    """Each sequence by itself, without padding -> [tokens, vocab]."""
    return torch.cat([model(part[None]).logits[0] for part in ids.split(list(lengths))])
