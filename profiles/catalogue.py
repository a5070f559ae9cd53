"""Names of models: one row each, with the source of its figures.

To add a model write one row in ``_MODEL_ROWS``; ``resolve_model`` turns what a user typed into one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from profiles.errors import unknown_name
from profiles.hf_config import FAMILIES, read_hf_config
from profiles.models import HeadKind, ModelSpec, RopeScaling


def _row(
    name: str, shape: tuple[int, int, int, int, int, int], vocab: int, source: str, **fields: Any
) -> ModelSpec:
    """``shape``: layers, hidden, heads, kv heads, head_dim, ffn; ``source``: a folder of the hub.

    The switches that a family implies need not be given.
    """
    num_layers, hidden, num_heads, num_kv_heads, head_dim, ffn = shape
    source = f"config.json of {source}" if "/" in source and "ours" not in source else source
    return ModelSpec(
        name=name, num_layers=num_layers, hidden=hidden, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, ffn=ffn, vocab=vocab, source=source,
        **{**FAMILIES[fields.get("family", "llama")].fixed, **fields},
    )  # fmt: skip


# ---- models -----------------------------------------------------------------------------------

_LLAMA1: dict[str, Any] = {"norm_eps": 1e-6, "max_positions": 2048}
_CODE_LLAMA: dict[str, Any] = {"rope_theta": 1e6, "max_positions": 16384}
_LLAMA3: dict[str, Any] = {"rope_theta": 5e5, "max_positions": 8192}


def _llama3(factor: float) -> dict[str, Any]:
    """3.1 and later: positions stretched from 8192 to 131072."""
    scaling = RopeScaling(kind="llama3", factor=factor, original_positions=8192)
    return {"rope_theta": 5e5, "rope_scaling": scaling, "max_positions": 131072}


_QWEN2: dict[str, Any] = {
    "family": "qwen2", "rope_theta": 1e6, "norm_eps": 1e-6, "max_positions": 32768,
}  # fmt: skip
_QWEN3: dict[str, Any] = {
    "family": "qwen3", "rope_theta": 1e6, "norm_eps": 1e-6, "max_positions": 40960,
}  # fmt: skip
_QWEN2_MOE: dict[str, Any] = {**_QWEN2, "family": "qwen2_moe", "normalize_top_k": False}
_QWEN3_MOE: dict[str, Any] = {
    **_QWEN3, "family": "qwen3_moe", "num_experts": 128, "experts_per_token": 8,
}  # fmt: skip
_MIXTRAL: dict[str, Any] = {
    "family": "mixtral", "num_experts": 8, "experts_per_token": 2, "rope_theta": 1e6,
}  # fmt: skip
_GEMMA: dict[str, Any] = {
    "family": "gemma", "activation": "gelu_tanh", "tied_embedding": True, "norm_eps": 1e-6,
    "max_positions": 8192,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "family": "gpt2", "activation": "gelu_tanh", "tied_embedding": True, "max_positions": 1024,
}  # fmt: skip
_PHI3: dict[str, Any] = {"family": "phi3", "sliding_window": 2047, "max_positions": 4096}

_MODEL_ROWS = (
    _row("llama1-7b", (32, 4096, 32, 32, 128, 11008), 32000, "huggyllama/llama-7b", **_LLAMA1),
    _row("llama1-13b", (40, 5120, 40, 40, 128, 13824), 32000, "huggyllama/llama-13b", **_LLAMA1),
    _row("llama1-30b", (60, 6656, 52, 52, 128, 17920), 32000, "huggyllama/llama-30b", **_LLAMA1),
    _row("llama1-65b", (80, 8192, 64, 64, 128, 22016), 32000, "huggyllama/llama-65b", **_LLAMA1),
    _row("llama-7b", (32, 4096, 32, 32, 128, 11008), 32000, "meta-llama/Llama-2-7b-hf"),
    _row("llama-13b", (40, 5120, 40, 40, 128, 13824), 32000, "meta-llama/Llama-2-13b-hf"),
    _row(
        "llama-34b", (48, 8192, 64, 8, 128, 22016), 32000,
        "codellama/CodeLlama-34b-hf (Llama 2 34B was not released)", **_CODE_LLAMA,
    ),
    _row("llama-70b", (80, 8192, 64, 8, 128, 28672), 32000, "meta-llama/Llama-2-70b-hf"),
    _row(
        "codellama-7b", (32, 4096, 32, 32, 128, 11008), 32016,
        "codellama/CodeLlama-7b-hf", **_CODE_LLAMA,
    ),
    _row(
        "codellama-13b", (40, 5120, 40, 40, 128, 13824), 32016,
        "codellama/CodeLlama-13b-hf", **_CODE_LLAMA,
    ),
    _row(
        "codellama-34b", (48, 8192, 64, 8, 128, 22016), 32000,
        "codellama/CodeLlama-34b-hf", **_CODE_LLAMA,
    ),
    _row(
        "llama3-8b", (32, 4096, 32, 8, 128, 14336), 128256, "meta-llama/Meta-Llama-3-8B", **_LLAMA3
    ),
    _row(
        "llama3-70b", (80, 8192, 64, 8, 128, 28672), 128256,
        "meta-llama/Meta-Llama-3-70B", **_LLAMA3,
    ),
    _row(
        "llama3.1-8b", (32, 4096, 32, 8, 128, 14336), 128256,
        "meta-llama/Llama-3.1-8B", **_llama3(8.0),
    ),
    _row(
        "llama3.1-70b", (80, 8192, 64, 8, 128, 28672), 128256,
        "meta-llama/Llama-3.1-70B", **_llama3(8.0),
    ),
    _row(
        "llama3.1-405b", (126, 16384, 128, 8, 128, 53248), 128256,
        "meta-llama/Llama-3.1-405B", **_llama3(8.0),
    ),
    _row(
        "llama3.2-1b", (16, 2048, 32, 8, 64, 8192), 128256,
        "meta-llama/Llama-3.2-1B", tied_embedding=True, **_llama3(32.0),
    ),
    _row(
        "llama3.2-3b", (28, 3072, 24, 8, 128, 8192), 128256,
        "meta-llama/Llama-3.2-3B", tied_embedding=True, **_llama3(32.0),
    ),
    _row(
        "tinyllama-1.1b", (22, 2048, 32, 4, 64, 5632), 32000,
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0", max_positions=2048,
    ),
    _row(
        "smollm2-135m", (30, 576, 9, 3, 64, 1536), 49152, "HuggingFaceTB/SmolLM2-135M-Instruct",
        tied_embedding=True, rope_theta=1e5, max_positions=8192,
    ),
    _row(
        "qwen2-7b", (28, 3584, 28, 4, 128, 18944), 152064, "Qwen/Qwen2-7B-Instruct", **_QWEN2
    ),
    _row(
        "qwen2.5-0.5b", (24, 896, 14, 2, 64, 4864), 151936, "Qwen/Qwen2.5-0.5B-Instruct",
        tied_embedding=True, **_QWEN2,
    ),
    _row(
        "qwen2.5-1.5b", (28, 1536, 12, 2, 128, 8960), 151936, "Qwen/Qwen2.5-1.5B-Instruct",
        tied_embedding=True, **_QWEN2,
    ),
    _row(
        "qwen2.5-3b", (36, 2048, 16, 2, 128, 11008), 151936, "Qwen/Qwen2.5-3B-Instruct",
        tied_embedding=True, **_QWEN2,
    ),
    _row(
        "qwen2.5-7b", (28, 3584, 28, 4, 128, 18944), 152064, "Qwen/Qwen2.5-7B-Instruct", **_QWEN2
    ),
    _row(
        "qwen2.5-14b", (48, 5120, 40, 8, 128, 13824), 152064, "Qwen/Qwen2.5-14B-Instruct", **_QWEN2
    ),
    _row(
        "qwen2.5-32b", (64, 5120, 40, 8, 128, 27648), 152064, "Qwen/Qwen2.5-32B-Instruct", **_QWEN2
    ),
    _row(
        "qwen2.5-72b", (80, 8192, 64, 8, 128, 29568), 152064, "Qwen/Qwen2.5-72B-Instruct", **_QWEN2
    ),
    _row(
        "qwen3-0.6b", (28, 1024, 16, 8, 128, 3072), 151936, "Qwen/Qwen3-0.6B",
        tied_embedding=True, **_QWEN3,
    ),
    _row(
        "qwen3-1.7b", (28, 2048, 16, 8, 128, 6144), 151936, "Qwen/Qwen3-1.7B",
        tied_embedding=True, **_QWEN3,
    ),
    _row(
        "qwen3-4b", (36, 2560, 32, 8, 128, 9728), 151936, "Qwen/Qwen3-4B",
        tied_embedding=True, **_QWEN3,
    ),
    _row("qwen3-8b", (36, 4096, 32, 8, 128, 12288), 151936, "Qwen/Qwen3-8B", **_QWEN3),
    _row("qwen3-14b", (40, 5120, 40, 8, 128, 17408), 151936, "Qwen/Qwen3-14B", **_QWEN3),
    _row("qwen3-32b", (64, 5120, 64, 8, 128, 25600), 151936, "Qwen/Qwen3-32B", **_QWEN3),
    _row(
        "qwen1.5-moe-a2.7b", (24, 2048, 16, 16, 128, 1408), 151936, "Qwen/Qwen1.5-MoE-A2.7B",
        num_experts=60, experts_per_token=4, shared_ffn=5632,
        **{**_QWEN2_MOE, "max_positions": 8192},
    ),
    _row(
        "qwen2-57b-a14b", (28, 3584, 28, 4, 128, 2560), 151936, "Qwen/Qwen2-57B-A14B-Instruct",
        num_experts=64, experts_per_token=8, shared_ffn=20480, **_QWEN2_MOE,
    ),
    _row(
        "deepseek-v2-lite-type", (27, 2048, 16, 16, 128, 1408), 102400,
        "ours: layers, widths and experts of deepseek-ai/DeepSeek-V2-Lite, with plain attention "
        "for its latent one and experts in its first layer too; a shape to plan with and run from "
        "random weights, its checkpoints are not read",
        num_experts=64, experts_per_token=6, shared_ffn=2816,
        **{**_QWEN2_MOE, "rope_theta": 1e4},
    ),
    _row("qwen3-30b-a3b", (48, 2048, 32, 4, 128, 768), 151936, "Qwen/Qwen3-30B-A3B", **_QWEN3_MOE),
    _row(
        "qwen3-235b-a22b", (94, 4096, 64, 4, 128, 1536), 151936, "Qwen/Qwen3-235B-A22B",
        **_QWEN3_MOE,
    ),
    _row(
        "mistral-7b-v0.1", (32, 4096, 32, 8, 128, 14336), 32000, "mistralai/Mistral-7B-v0.1",
        family="mistral", sliding_window=4096, max_positions=32768,
    ),
    _row(
        "mistral-7b", (32, 4096, 32, 8, 128, 14336), 32000,
        "mistralai/Mistral-7B-Instruct-v0.2 (no sliding window)",
        family="mistral", rope_theta=1e6, max_positions=32768,
    ),
    _row(
        "mistral-nemo-12b", (40, 5120, 32, 8, 128, 14336), 131072,
        "mistralai/Mistral-Nemo-Instruct-2407",
        family="mistral", rope_theta=1e6, max_positions=131072,
    ),
    _row(
        "mixtral-8x7b", (32, 4096, 32, 8, 128, 14336), 32000, "mistralai/Mixtral-8x7B-v0.1",
        max_positions=32768, **_MIXTRAL,
    ),
    _row(
        "mixtral-8x22b", (56, 6144, 48, 8, 128, 16384), 32000, "mistralai/Mixtral-8x22B-v0.1",
        max_positions=65536, **_MIXTRAL,
    ),
    _row("gemma-2b", (18, 2048, 8, 1, 256, 16384), 256000, "google/gemma-2b", **_GEMMA),
    _row("gemma-7b", (28, 3072, 16, 16, 256, 24576), 256000, "google/gemma-7b", **_GEMMA),
    _row("gpt2", (12, 768, 12, 12, 64, 3072), 50257, "openai-community/gpt2", **_GPT2),
    _row(
        "gpt2-medium", (24, 1024, 16, 16, 64, 4096), 50257, "openai-community/gpt2-medium", **_GPT2
    ),
    _row(
        "gpt2-large", (36, 1280, 20, 20, 64, 5120), 50257, "openai-community/gpt2-large", **_GPT2
    ),
    _row("gpt2-xl", (48, 1600, 25, 25, 64, 6400), 50257, "openai-community/gpt2-xl", **_GPT2),
    _row(
        "phi3-mini", (32, 3072, 32, 32, 96, 8192), 32064, "microsoft/Phi-3-mini-4k-instruct",
        **_PHI3,
    ),
    _row(
        "phi3-medium", (40, 5120, 40, 10, 128, 17920), 32064, "microsoft/Phi-3-medium-4k-instruct",
        **_PHI3,
    ),
    _row(
        "phi4", (40, 5120, 40, 10, 128, 17920), 100352, "microsoft/phi-4",
        family="phi3", rope_theta=2.5e5, max_positions=16384,
    ),
    _row(
        "tiny", (4, 64, 4, 2, 16, 128), 512, "ours: a shape for tests",
        tied_embedding=True, max_positions=4096,
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
