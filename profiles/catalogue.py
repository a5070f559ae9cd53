"""Names of models: one row each, with the source of its figures.

To add a model write one row in ``MODELS``; ``resolve_model`` turns what a user typed into one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from profiles.errors import unknown_name
from profiles.models import HeadKind, ModelSpec, read_hf_config

# ---- models -----------------------------------------------------------------------------------

_LLAMA2 = "Touvron et al. 2023 (Llama 2), and config.json of meta-llama/Llama-2-{}-hf"
_LLAMA3 = "config.json of meta-llama/Meta-Llama-3-{}"
_QWEN = "config.json of Qwen/Qwen2.5-{}-Instruct"

_MODEL_ROWS = (
    ModelSpec(
        name="llama-7b", num_layers=32, hidden=4096, num_heads=32, num_kv_heads=32, head_dim=128,
        ffn=11008, vocab=32000, max_positions=4096, source=_LLAMA2.format("7b"),
    ),
    ModelSpec(
        name="llama-13b", num_layers=40, hidden=5120, num_heads=40, num_kv_heads=40, head_dim=128,
        ffn=13824, vocab=32000, max_positions=4096, source=_LLAMA2.format("13b"),
    ),
    ModelSpec(
        name="llama-34b", num_layers=48, hidden=8192, num_heads=64, num_kv_heads=8, head_dim=128,
        ffn=22016, vocab=32000, rope_theta=1e6, max_positions=16384,
        source="config.json of codellama/CodeLlama-34b-hf (Llama 2 34B was not released)",
    ),
    ModelSpec(
        name="llama-70b", num_layers=80, hidden=8192, num_heads=64, num_kv_heads=8, head_dim=128,
        ffn=28672, vocab=32000, max_positions=4096, source=_LLAMA2.format("70b"),
    ),
    ModelSpec(
        name="llama3-8b", num_layers=32, hidden=4096, num_heads=32, num_kv_heads=8, head_dim=128,
        ffn=14336, vocab=128256, rope_theta=5e5, max_positions=8192, source=_LLAMA3.format("8B"),
    ),
    ModelSpec(
        name="llama3-70b", num_layers=80, hidden=8192, num_heads=64, num_kv_heads=8, head_dim=128,
        ffn=28672, vocab=128256, rope_theta=5e5, max_positions=8192, source=_LLAMA3.format("70B"),
    ),
    ModelSpec(
        name="smollm2-135m", num_layers=30, hidden=576, num_heads=9, num_kv_heads=3, head_dim=64,
        ffn=1536, vocab=49152, tied_embedding=True, rope_theta=1e5, max_positions=8192,
        source="config.json of HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    ModelSpec(
        name="qwen2.5-0.5b", family="qwen2", num_layers=24, hidden=896, num_heads=14,
        num_kv_heads=2, head_dim=64, ffn=4864, vocab=151936, tied_embedding=True, rope_theta=1e6,
        norm_eps=1e-6, max_positions=32768, qkv_bias=True, source=_QWEN.format("0.5B"),
    ),
    ModelSpec(
        name="qwen2.5-1.5b", family="qwen2", num_layers=28, hidden=1536, num_heads=12,
        num_kv_heads=2, head_dim=128, ffn=8960, vocab=151936, tied_embedding=True, rope_theta=1e6,
        norm_eps=1e-6, max_positions=32768, qkv_bias=True, source=_QWEN.format("1.5B"),
    ),
    ModelSpec(
        name="qwen2.5-7b", family="qwen2", num_layers=28, hidden=3584, num_heads=28,
        num_kv_heads=4, head_dim=128, ffn=18944, vocab=152064, rope_theta=1e6, norm_eps=1e-6,
        max_positions=32768, qkv_bias=True, source=_QWEN.format("7B"),
    ),
    ModelSpec(
        name="mistral-7b", family="mistral", num_layers=32, hidden=4096, num_heads=32,
        num_kv_heads=8, head_dim=128, ffn=14336, vocab=32000, rope_theta=1e6, max_positions=32768,
        source="config.json of mistralai/Mistral-7B-Instruct-v0.2 (no sliding window)",
    ),
    ModelSpec(
        name="tinyllama-1.1b", num_layers=22, hidden=2048, num_heads=32, num_kv_heads=4,
        head_dim=64, ffn=5632, vocab=32000, max_positions=2048,
        source="config.json of TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    ),
    ModelSpec(
        name="tiny", num_layers=4, hidden=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn=128,
        vocab=512, tied_embedding=True, max_positions=4096, source="ours: a shape for tests",
    ),
)  # fmt: skip
MODELS: Mapping[str, ModelSpec] = {spec.name: spec for spec in _MODEL_ROWS}


def resolve_model(name_or_path: str, head: HeadKind = "lm") -> ModelSpec:
    """The model of a catalogue name, or of a Hugging Face folder or ``config.json``.

    >>> resolve_model("llama-7b").num_parameters
    6738415616

    Raises:
        ConfigError: neither a known name (lists the nearest) nor a readable config.
    """
    if name_or_path in MODELS:
        return MODELS[name_or_path].with_head(head)
    path = Path(name_or_path)
    if path.exists() or os.sep in name_or_path or path.suffix == ".json":
        return read_hf_config(path, head=head)
    error = unknown_name("model", name_or_path, MODELS, where="--model")
    error.remedy += "; or give a Hugging Face folder"
    raise error
