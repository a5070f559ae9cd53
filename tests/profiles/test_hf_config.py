"""Protects reading config.json: fields as published, and refusals of what would compute otherwise.

Oracles: excerpts of the checkpoints' own files, in the older form of transformers 4, and its
config classes' defaults. Logits of such files are ``tests/executor/test_families.py``'s.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from profiles.errors import ConfigError
from profiles.hf_config import (
    ACTIVATIONS,
    COMMON_KEYS,
    FAMILIES,
    hf_config,
    read_hf_config,
    spec_from_hf,
)
from profiles.models import ModelSpec, RopeScaling

BASE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3,
    "intermediate_size": 96, "vocab_size": 128, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "num_key_value_heads": 4,
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"


def read(**changes: Any) -> ModelSpec:
    return spec_from_hf({**BASE, **changes}, name="x")


def test_llama_3_1_as_its_file_says_it() -> None:
    scaling = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
               "original_max_position_embeddings": 8192, "rope_type": "llama3"}  # fmt: skip
    spec = read(rope_scaling=scaling, rope_theta=500000.0, num_key_value_heads=2)
    assert spec.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_positions=8192)
    assert (spec.rope_theta, spec.num_kv_heads, spec.head_dim) == (5e5, 2, 16)
    # transformers 5 writes one field; earlier versions called the kind "type".
    again = read(
        rope_parameters={**scaling, "rope_theta": 5e5}, rope_theta=None, num_key_value_heads=2
    )
    assert again == spec
    scaling["type"] = scaling.pop("rope_type")
    assert read(rope_scaling=scaling, rope_theta=5e5, num_key_value_heads=2) == spec


def test_gemma_as_its_first_file_says_it() -> None:
    """gelu means its approximation, the head is tied without saying so, null is the default."""
    spec = read(model_type="gemma", hidden_act="gelu", head_dim=None, hidden_activation=None)
    assert (spec.activation, spec.tied_embedding, spec.head_dim) == ("gelu_tanh", True, 256)
    assert (spec.norm, spec.scaled_embedding) == ("rms_plus_one", True)


def test_gpt2_as_its_file_says_it() -> None:
    spec = spec_from_hf(
        {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
         "n_ctx": 1024, "vocab_size": 50257, "layer_norm_epsilon": 1e-5,
         "activation_function": "gelu_new", "attn_pdrop": 0.1},
        name="gpt2",
    )  # fmt: skip
    assert (spec.ffn, spec.num_kv_heads, spec.head_dim, spec.tied_embedding) == (3072, 12, 64, True)
    assert spec.num_parameters == 124_439_808


def test_experts_as_their_files_say_them() -> None:
    mixtral = read(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
    assert (mixtral.num_experts, mixtral.experts_per_token) == (8, 2)
    assert mixtral.normalize_top_k
    fields = {"moe_intermediate_size": 32, "num_experts_per_tok": 4, "norm_topk_prob": False}
    qwen = read(model_type="qwen2_moe", num_experts=60, shared_expert_intermediate_size=48,
                decoder_sparse_step=1, mlp_only_layers=[], **fields)  # fmt: skip
    assert (qwen.ffn, qwen.shared_ffn, qwen.num_experts, qwen.qkv_bias) == (32, 48, 60, True)
    assert not qwen.normalize_top_k
    # transformers 5 gives Qwen's number of experts Mixtral's name.
    again = read(model_type="qwen2_moe", num_local_experts=60, shared_expert_intermediate_size=48,
                 **fields)  # fmt: skip
    assert again == qwen


EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 48,
}  # fmt: skip
WINDOW: dict[str, Any] = {"sliding_window": 64, "use_sliding_window": True, **EXPERTS}


@pytest.mark.parametrize(
    "fields, window",
    [
        ({"model_type": "mistral", "sliding_window": 64}, 64),
        ({"model_type": "mistral", "sliding_window": None}, 0),
        ({"model_type": "mistral", "sliding_window": 256}, 0),  # binds nobody
        ({"model_type": "phi3", "sliding_window": 47}, 47),
        ({"model_type": "llama", "sliding_window": 64}, 0),  # not a field of LLaMA's
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False}, 0),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True}, 0),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 64,
                "use_sliding_window": True,
                "max_window_layers": 0,
            },
            64,
        ),
        # Of every other layer below max_window_layers, and three layers have both.
        (WINDOW | {"model_type": "qwen2_moe", "max_window_layers": 0}, 0),
        (WINDOW | {"model_type": "qwen2_moe", "num_hidden_layers": 1}, 64),
        (WINDOW | {"model_type": "qwen2_moe", "sliding_window": 256}, 0),
        (WINDOW | {"model_type": "qwen3_moe", "max_window_layers": 28}, 64),
        # Where the kinds of layers are given they decide.
        (WINDOW | {"model_type": "qwen2", "layer_types": [SLIDING] * 3}, 64),
        (WINDOW | {"model_type": "qwen2_moe", "layer_types": [SLIDING] * 3}, 64),
        (WINDOW | {"model_type": "qwen3", "max_window_layers": 0, "layer_types": [FULL] * 3}, 0),
        (WINDOW | {"model_type": "qwen3", "layer_types": None, "max_window_layers": 0}, 64),
        # Both kinds, and a window that binds nobody.
        (
            WINDOW
            | {"model_type": "qwen2", "sliding_window": 256, "layer_types": [FULL, SLIDING, FULL]},
            0,
        ),
        ({"model_type": "mistral", "sliding_window": 64, "layer_types": [SLIDING] * 3}, 64),
        ({"layer_types": [FULL] * 3}, 0),
    ],
)
def test_a_window_counts_where_the_family_uses_it(fields: dict[str, Any], window: int) -> None:
    """Qwen2's first ``max_window_layers``, by default 28, see everything."""
    assert read(**fields).sliding_window == window


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_field_that_is_left_out_is_what_transformers_takes(model_type: str) -> None:
    """The sizes given and nothing else; kv heads by default are up to 32."""
    transformers = pytest.importorskip("transformers")
    sizes = {key: BASE[key] for key in ("vocab_size", "intermediate_size", "num_hidden_layers")}
    sizes |= {"hidden_size": 256, "num_attention_heads": 32, "max_position_embeddings": 256}
    if model_type == "gpt2":
        sizes = {"n_embd": 256, "n_head": 32, "n_layer": 3, "n_positions": 256, "vocab_size": 128}
    sizes |= {k: v for k, v in EXPERTS.items() if model_type.endswith("_moe")}
    theirs = transformers.AutoConfig.for_model(model_type, **sizes)
    ours = spec_from_hf({"model_type": model_type, **sizes}, name="x")
    keys = {**COMMON_KEYS, **FAMILIES[model_type].keys}
    assert ours.norm_eps == getattr(theirs, keys["norm_eps"])
    assert ours.activation == ACTIVATIONS[getattr(theirs, keys["activation"])]
    assert ours.num_kv_heads == (getattr(theirs, "num_key_value_heads", None) or 32)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert ours.tied_embedding == theirs.tie_word_embeddings
    assert ours.normalize_top_k == getattr(theirs, "norm_topk_prob", True)
    if model_type != "gpt2":
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.o_bias == getattr(theirs, "attention_bias", False)
    # Default windows, where there are any, are longer than these positions.
    longer = spec_from_hf({"model_type": model_type, **sizes, keys["max_positions"]: 8192}, name="")
    slides = SLIDING in getattr(theirs, "layer_types", [SLIDING])
    window = getattr(theirs, "sliding_window", None) if slides else None
    assert longer.sliding_window == (window or 0)


def test_nothing_said_of_kv_heads_is_not_null() -> None:
    """Null: as many as heads; left out: the family's number."""
    mistral = {"model_type": "mistral", "num_attention_heads": 16}
    assert read(**mistral, num_key_value_heads=None).num_kv_heads == 16
    fields = {k: v for k, v in BASE.items() if k != "num_key_value_heads"} | mistral
    assert spec_from_hf(fields, name="x").num_kv_heads == 8


def test_a_norm_without_epsilon_stays_without() -> None:
    assert read(rms_norm_eps=0.0).norm_eps == 0.0


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_positions_of_pre_training_may_stand_beside_the_scaling(kind: str) -> None:
    """There they win, as in transformers; nowhere, they are the longest."""
    rope = {"rope_type": kind, "factor": 4.0}

    def positions(**fields: Any) -> int:
        scaling = read(**fields).rope_scaling
        assert scaling is not None
        return scaling.original_positions

    assert positions(rope_scaling=rope, original_max_position_embeddings=32) == 32
    inside = rope | {"original_max_position_embeddings": 64}
    assert positions(rope_parameters=inside) == 64
    assert positions(rope_parameters=inside, original_max_position_embeddings=32) == 32
    assert positions(rope_parameters=rope) == 256


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "gemma2"}, r"'gemma2' is not supported \(its soft-capped logits"),
        ({"model_type": "gemma3_text"}, r"'gemma3_text' is not supported \(its layers with two"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: gemma, gpt2"),
        ({"model_type": "deepseek_v2"}, r"its latent attention is not.*deepseek-v2-lite-type"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be a whole number"),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"hidden_act": "relu"}, "the activation 'relu' is not supported; supported: silu"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling: rope scaling without a factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supp"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "0.5 is not at least 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.75}}, "rotated in part are not supported"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}},
            "rope's mscale is not supported",
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 64,
                "use_sliding_window": True,
                "max_window_layers": 2,
            },
            "max_window_layers: layers of full_attention and sliding_attention with a sliding "
            "window of 64 tokens are not supported; all layers must be of full_attention, or all",
        ),
        (
            WINDOW | {"model_type": "qwen2_moe", "max_window_layers": 28},
            "max_window_layers: layers of full_attention and sliding_attention",
        ),
        (
            WINDOW | {"model_type": "qwen2", "layer_types": [FULL, SLIDING, FULL]},
            "layer_types: layers of full_attention and sliding_attention",
        ),
        (
            WINDOW | {"model_type": "qwen2", "layer_types": ["chunked_attention"] * 3},
            "layer_types: layers of chunked_attention with",
        ),
        (
            {"model_type": "qwen2", "layer_types": [SLIDING] * 3},
            "layers of sliding_attention with a sliding window of 0 tokens",
        ),
        (
            WINDOW | {"model_type": "qwen2", "layer_types": [SLIDING]},
            "layer_types: not a list with an entry per layer",
        ),
        (WINDOW | {"model_type": "qwen2", "layer_types": "full"}, "layer_types: not a list"),
        # transformers masks these by the window alone.
        (
            {"model_type": "mistral", "sliding_window": 64, "layer_types": [FULL] * 3},
            "layer_types: layers of full_attention and sliding_attention",
        ),
        ({"layer_types": [SLIDING] * 3, "sliding_window": 64}, "layer_types: layers of full_att"),
        ({"is_causal": False}, "is_causal False is not supported"),
        (
            {"model_type": "gemma", "use_bidirectional_attention": True},
            "use_bidirectional_attention True is not supported",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantization_config: quantised weights are not supported; give the original",
        ),
        ({"original_max_position_embeddings": "4k"}, "is '4k'; give a number"),
        (
            {"model_type": "qwen3_moe", "decoder_sparse_step": 2},
            "decoder_sparse_step 2 is not supported",
        ),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**fields)


@pytest.mark.parametrize(
    "text, message", [("{", "not JSON"), ("[]", "not a JSON object"), ("\xff", "not JSON")]
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=rf"config.json: {message}"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_config_is_json_and_read_back(family: str) -> None:
    experts = {"num_experts": 4, "experts_per_token": 2} if "num_experts" in (
        FAMILIES[family].keys
    ) else {}  # fmt: skip
    fields: dict[str, Any] = {**FAMILIES[family].fixed, **experts}
    spec = ModelSpec(
        name="x", family=family, num_layers=2, hidden=32, num_heads=4, num_kv_heads=4, head_dim=8,
        ffn=48, vocab=99, source="config.json", **fields,
    )  # fmt: skip
    config = json.loads(json.dumps(hf_config(spec))) | {"tie_word_embeddings": False}
    assert spec_from_hf(config, name="x") == spec
    if family not in ("llama", "gemma", "gpt2"):
        narrow = replace(spec, sliding_window=8)
        config = json.loads(json.dumps(hf_config(narrow))) | {"tie_word_embeddings": False}
        assert spec_from_hf(config, name="x") == narrow
    plan = ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert plan == spec


def test_a_plan_keeps_stretched_positions() -> None:
    spec = read(rope_scaling={"type": "linear", "factor": 2.0})
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(ConfigError, match="rope type 'wide' is not supported"):
        ModelSpec.from_dict({**spec.to_dict(), "rope_scaling": {"kind": "wide", "factor": 2.0}})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_experts": 2}, "0 of 2 experts cannot take a token"),
        ({"num_experts": 2, "experts_per_token": 3}, "3 of 2 experts"),
        ({"sliding_window": -1}, "-1 is not a whole number"),
        ({"norm": "batch"}, "'batch' is not one of rms, rms_plus_one, layer"),
        ({"num_kv_heads": 3}, "4 heads cannot share 3 kv heads evenly"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelSpec.from_dict({**read().to_dict(), **changes})
