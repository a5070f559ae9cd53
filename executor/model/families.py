"""Hugging Face's names and configs for the families that ``DecoderStage`` runs, as tables.

A family is a row: what its config says and what its classes are called. The three share their
tensors' names. Files are ``hf_weights``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from profiles.models import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """``model_type`` of config.json is the key in FAMILIES; class names are transformers'."""

    lm_class: str
    scalar_class: str
    # Fields of config.json beyond those that follow from the shape.
    config: Mapping[str, Any]


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        lm_class="LlamaForCausalLM",
        scalar_class="LlamaForSequenceClassification",
        config={"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        lm_class="MistralForCausalLM",
        scalar_class="MistralForSequenceClassification",
        config={"sliding_window": None},
    ),
    "qwen2": Family(
        lm_class="Qwen2ForCausalLM",
        scalar_class="Qwen2ForSequenceClassification",
        config={"use_sliding_window": False},
    ),
}

# Ours -> theirs, outside the blocks. The head's name depends on its kind.
OUTER_NAMES: Mapping[str, str] = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
}
HEAD_NAMES: Mapping[str, str] = {"lm": "lm_head.weight", "scalar": "score.weight"}

# Ours -> theirs, after "layers.N." and "model.layers.N.".
BLOCK_NAMES: Mapping[str, str] = {
    "attention_norm.weight": "input_layernorm.weight",
    "q.weight": "self_attn.q_proj.weight",
    "k.weight": "self_attn.k_proj.weight",
    "v.weight": "self_attn.v_proj.weight",
    "q.bias": "self_attn.q_proj.bias",
    "k.bias": "self_attn.k_proj.bias",
    "v.bias": "self_attn.v_proj.bias",
    "o.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "gate.weight": "mlp.gate_proj.weight",
    "up.weight": "mlp.up_proj.weight",
    "down.weight": "mlp.down_proj.weight",
}


def hf_name(name: str, spec: ModelSpec) -> str:
    """Hugging Face's name of one of our parameters.

    ``layers.3.q.weight`` is ``model.layers.3.self_attn.q_proj.weight``.
    """
    if name == "head.weight":
        return HEAD_NAMES[spec.head]
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{BLOCK_NAMES[rest]}"


def hf_config(spec: ModelSpec) -> dict[str, Any]:
    """config.json of ``spec`` from its shape alone: what transformers needs to open the weights."""
    return {
        "model_type": spec.family,
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "max_position_embeddings": spec.max_positions,
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "rms_norm_eps": spec.norm_eps,
        # Version 5 of transformers reads the first, earlier ones the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "rope_theta": spec.rope_theta,
        "vocab_size": spec.vocab,
        **FAMILIES[spec.family].config,
    }


def head_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of config.json that say what the head is."""
    family = FAMILIES[spec.family]
    if spec.head == "lm":
        return {"architectures": [family.lm_class], "tie_word_embeddings": spec.tied_embedding}
    return {
        "architectures": [family.scalar_class],
        "tie_word_embeddings": False,
        "num_labels": 1,
        # transformers reads the number of labels back from this table.
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
