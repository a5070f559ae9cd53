"""Hugging Face's names of tensors and classes for the families that ``DecoderStage`` runs.

Read ``stored`` first: where in a checkpoint one of our parameters lies. A family is a row of
tables; ``config.json`` is ``profiles.hf_config``'s, files are ``hf_load`` and ``hf_save``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any

from planner.layout import ParameterShape, parameters
from profiles.models import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """``model_type`` of config.json is the key in FAMILIES; class names are transformers'.

    ``prefix``: of the decoder's tensors, which a checkpoint of the bare decoder lacks. ``outer``
    and ``blocks``: ours -> theirs, after the prefix and after "<prefix>.<layers>.N.". Ours with one
    name of theirs lie in it one below the other, in the table's order. ``{}`` in a name of theirs
    is an expert; a tuple names what lies at the second index of ours. ``transposed``: theirs are
    [in, out] as in GPT-2's Conv1D. ``ignored``: endings of tensors that hold nothing.
    """

    lm_class: str
    scalar_class: str
    prefix: str = "model"
    layers: str = "layers"
    outer: Mapping[str, str]
    blocks: Mapping[str, str | tuple[str, ...]]
    transposed: frozenset[str] = field(default_factory=frozenset)
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)


OUTER: Mapping[str, str] = {
    "embedding.weight": "embed_tokens.weight",
    "final_norm.weight": "norm.weight",
}
HEAD_NAMES: Mapping[str, str] = {"lm": "lm_head.weight", "scalar": "score.weight"}

ATTENTION: Mapping[str, str] = {
    "attention_norm.weight": "input_layernorm.weight",
    **{f"{x}.{kind}": f"self_attn.{x}_proj.{kind}" for x in "qkvo" for kind in ("weight", "bias")},
    "q_norm.weight": "self_attn.q_norm.weight",
    "k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
DENSE: Mapping[str, str] = {
    **ATTENTION,
    **{
        f"{x}.{kind}": f"mlp.{x}_proj.{kind}"
        for x in ("gate", "up", "down")
        for kind in ("weight", "bias")
    },
}
QWEN_EXPERTS: Mapping[str, str | tuple[str, ...]] = {
    **ATTENTION,
    "router.weight": "mlp.gate.weight",
    "experts.gate_up.weight": (
        "mlp.experts.{}.gate_proj.weight",
        "mlp.experts.{}.up_proj.weight",
    ),
    "experts.down.weight": "mlp.experts.{}.down_proj.weight",
    **{f"shared.{x}.weight": f"mlp.shared_expert.{x}_proj.weight" for x in ("gate", "up", "down")},
    "shared_gate.weight": "mlp.shared_expert_gate.weight",
}


def _llama_like(name: str, blocks: Mapping[str, str | tuple[str, ...]] = DENSE) -> Family:
    return Family(
        lm_class=f"{name}ForCausalLM",
        scalar_class=f"{name}ForSequenceClassification",
        outer=OUTER,
        blocks=blocks,
    )


FAMILIES: Mapping[str, Family] = {
    "llama": _llama_like("Llama"),
    "mistral": _llama_like("Mistral"),
    "qwen2": _llama_like("Qwen2"),
    "qwen3": _llama_like("Qwen3"),
    "gemma": _llama_like("Gemma"),
    "phi3": _llama_like(
        "Phi3",
        {
            **DENSE,
            **{f"{x}.weight": "self_attn.qkv_proj.weight" for x in "qkv"},
            **{f"{x}.weight": "mlp.gate_up_proj.weight" for x in ("gate", "up")},
        },
    ),
    "gpt2": Family(
        lm_class="GPT2LMHeadModel",
        scalar_class="GPT2ForSequenceClassification",
        prefix="transformer",
        layers="h",
        outer={
            "embedding.weight": "wte.weight",
            "position.weight": "wpe.weight",
            "final_norm.weight": "ln_f.weight",
            "final_norm.bias": "ln_f.bias",
        },
        blocks={
            **{f"attention_norm.{kind}": f"ln_1.{kind}" for kind in ("weight", "bias")},
            **{f"{x}.{kind}": f"attn.c_attn.{kind}" for kind in ("weight", "bias") for x in "qkv"},
            **{f"o.{kind}": f"attn.c_proj.{kind}" for kind in ("weight", "bias")},
            **{f"ffn_norm.{kind}": f"ln_2.{kind}" for kind in ("weight", "bias")},
            **{f"up.{kind}": f"mlp.c_fc.{kind}" for kind in ("weight", "bias")},
            **{f"down.{kind}": f"mlp.c_proj.{kind}" for kind in ("weight", "bias")},
        },
        transposed=frozenset({"q", "k", "v", "o", "up", "down"}),
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
    "mixtral": _llama_like(
        "Mixtral",
        {
            **ATTENTION,
            "router.weight": "block_sparse_moe.gate.weight",
            "experts.gate_up.weight": (
                "block_sparse_moe.experts.{}.w1.weight",
                "block_sparse_moe.experts.{}.w3.weight",
            ),
            "experts.down.weight": "block_sparse_moe.experts.{}.w2.weight",
        },
    ),
    "qwen2_moe": _llama_like("Qwen2Moe", QWEN_EXPERTS),
    "qwen3_moe": _llama_like("Qwen3Moe", QWEN_EXPERTS),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Where a checkpoint keeps (a part of) one of our parameters.

    ``ours[index]`` is rows ``first_row`` … of tensor ``name``, which is ``shape`` and, where
    ``transposed``, has our rows as columns.
    """

    name: str
    index: tuple[int, ...] = ()
    first_row: int = 0
    transposed: bool = False


@lru_cache(maxsize=32)
def stored(spec: ModelSpec) -> Mapping[str, tuple[Stored, ...]]:
    """Every parameter of ``spec`` by our name, with its places in a checkpoint."""
    rows: dict[str, int] = {}  # of each tensor of theirs, those that are taken
    found: dict[str, tuple[Stored, ...]] = {}
    for parameter in parameters(spec):
        places = []
        for name, index in _their_names(parameter, spec):
            place = Stored(
                name=name,
                index=index,
                first_row=rows.get(name, 0),
                transposed=_is_transposed(parameter, spec),
            )
            rows[name] = place.first_row + parameter.shape[len(index)]
            places.append(place)
        found[parameter.name] = tuple(places)
    return found


def _their_names(parameter: ParameterShape, spec: ModelSpec) -> list[tuple[str, tuple[int, ...]]]:
    """(name of theirs, leading index into ours) of every tensor that holds a part of ours."""
    family, name = FAMILIES[spec.family], parameter.name
    if name == "head.weight":
        return [(HEAD_NAMES[spec.head], ())]
    if name in family.outer:
        return [(f"{family.prefix}.{family.outer[name]}", ())]
    _, layer, rest = name.split(".", 2)
    theirs, base = family.blocks[rest], f"{family.prefix}.{family.layers}.{layer}."
    if isinstance(theirs, str) and "{}" not in theirs:
        return [(base + theirs, ())]
    if isinstance(theirs, str):
        return [(base + theirs.format(e), (e,)) for e in range(parameter.shape[0])]
    indices = product(range(parameter.shape[0]), range(len(theirs)))
    return [(base + theirs[part].format(e), (e, part)) for e, part in indices]


def _is_transposed(parameter: ParameterShape, spec: ModelSpec) -> bool:
    return (
        len(parameter.shape) == 2
        and parameter.name.split(".")[-2] in FAMILIES[spec.family].transposed
    )


@lru_cache(maxsize=32)
def stored_shapes(spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint of ``spec``."""
    wholes = {parameter.name: parameter for parameter in parameters(spec)}
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, places in stored(spec).items():
        for place in places:
            rows, *rest = wholes[ours].shape[len(place.index) :]
            shape = (place.first_row + rows, *rest)
            shapes[place.name] = shape[::-1] if place.transposed else shape
    return shapes


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
