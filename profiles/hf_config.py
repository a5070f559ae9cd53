"""``config.json`` of Hugging Face: which of its fields is which of ``ModelSpec``'s, both ways.

Read ``FAMILIES`` first: a row per ``model_type``. ``spec_from_hf`` reads by these rows and
``hf_config`` writes by them. What the decoder would silently compute otherwise is refused. Names
of tensors are ``executor.model.families``'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from profiles.errors import ConfigError
from profiles.models import MAX_LAYERS, Activation, HeadKind, ModelSpec, RopeScaling

# Our field -> theirs, where a family has no other name for it.
COMMON_KEYS: Mapping[str, str] = {
    "num_layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFamily:
    """A ``model_type``.

    ``keys``: other names of fields than ``COMMON_KEYS``, empty for one that it lacks.
    ``defaults``: what transformers takes for a field of theirs that the file leaves out.
    ``fixed``: fields of ``ModelSpec`` that the family implies. ``extra``: fields of theirs that
    must have these values, and are written so.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: Mapping[str, ConfigFamily] = {
    "llama": ConfigFamily(),
    "mistral": ConfigFamily(defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": ConfigFamily(
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
        fixed={"qkv_bias": True},
    ),
    "qwen3": ConfigFamily(
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        fixed={"qk_norm": True},
    ),
    "gemma": ConfigFamily(
        defaults={
            "num_key_value_heads": 16,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
        fixed={"norm": "rms_plus_one", "scaled_embedding": True},
    ),
    "gpt2": ConfigFamily(
        keys={
            "num_layers": "n_layer",
            "hidden": "n_embd",
            "num_heads": "n_head",
            "num_kv_heads": "",
            "head_dim": "",
            "ffn": "n_inner",
            "max_positions": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
        },
        defaults={
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
        },
        fixed={
            "norm": "layer",
            "positions": "learned",
            "gated": False,
            "qkv_bias": True,
            "o_bias": True,
            "ffn_bias": True,
        },
        extra={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
    "phi3": ConfigFamily(defaults={"rms_norm_eps": 1e-5}, extra={"partial_rotary_factor": 1.0}),
    "mixtral": ConfigFamily(
        keys={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
        defaults={
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
        },
    ),
    "qwen2_moe": ConfigFamily(
        keys={
            "ffn": "moe_intermediate_size",
            "shared_ffn": "shared_expert_intermediate_size",
            "num_experts": "num_experts",
            "experts_per_token": "num_experts_per_tok",
            "normalize_top_k": "norm_topk_prob",
        },
        defaults={
            "num_key_value_heads": 16,
            "norm_topk_prob": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        fixed={"qkv_bias": True},
        extra={"decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "qwen3_moe": ConfigFamily(
        keys={
            "ffn": "moe_intermediate_size",
            "num_experts": "num_experts",
            "experts_per_token": "num_experts_per_tok",
            "normalize_top_k": "norm_topk_prob",
        },
        defaults={"num_key_value_heads": 4, "norm_topk_prob": False, "sliding_window": 4096},
        fixed={"qk_norm": True},
        extra={"decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
}

# Whatever the family: transformers shows a token the later ones where these are otherwise.
CAUSAL: Mapping[str, bool] = {"is_causal": True, "use_bidirectional_attention": False}

# A layer without and one with the sliding window, in ``layer_types``. Of other families than
# these transformers does not read the field when it masks.
_KINDS = ("full_attention", "sliding_attention")
READ_LAYER_TYPES = ("qwen2", "qwen2_moe", "qwen3")

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# What the llama3 and yarn kinds of ``RopeScaling`` are called there.
ROPE_KEYS: Mapping[str, str] = {
    "factor": "factor",
    "original_positions": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
ROPE_FIELDS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "original_positions", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_positions", "beta_fast", "beta_slow", "attention_factor"),
}


# ---- reading ----------------------------------------------------------------------------------


def read_hf_config(path: str | Path, *, head: HeadKind = "lm") -> ModelSpec:
    """The ``ModelSpec`` of a Hugging Face ``config.json`` (the file, or a folder that holds it).

    Raises:
        ConfigError: no such file, not JSON, a needed field missing, or a ``model_type`` or an
            option that the decoder does not compute.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            "no such file", where=str(file), remedy="give a Hugging Face folder or a catalogue name"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"not JSON ({error})", where=str(file)) from None
    if not isinstance(config, dict):
        raise ConfigError("not a JSON object", where=str(file))
    return spec_from_hf(config, head=head, where=str(file), name=file.parent.name or "model")


_LATENT = " (its latent attention is not; a shape like it is --model deepseek-v2-lite-type)"
_TWO_KINDS = " (its layers with two kinds of attention are not)"
# What the decoder would have to compute for families that users ask for.
LACKS: Mapping[str, str] = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "gemma2": " (its soft-capped logits and norms behind each part are not)",
    "gemma3": _TWO_KINDS,
    "gemma3_text": _TWO_KINDS,
    "llama4": _TWO_KINDS,
    "phi": " (its heads that are rotated in part are not)",
    "gpt_oss": " (its attention sinks are not)",
}


def spec_from_hf(
    config: Mapping[str, Any], *, head: HeadKind = "lm", where: str = "config.json", name: str
) -> ModelSpec:
    """The ``ModelSpec`` of a parsed Hugging Face config; raises ``ConfigError`` as above."""
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ConfigError(
            f"model_type {model_type!r} is not supported{LACKS.get(str(model_type), '')}",
            where=where,
            remedy=f"supported: {', '.join(sorted(FAMILIES))}",
        )
    if config.get("quantization_config") is not None:
        raise ConfigError(
            "quantised weights are not supported",
            where=f"{where}: quantization_config",
            remedy="give the original checkpoint, or dequantise it to bf16, fp16 or fp32",
        )
    # A null is what transformers takes by default, but of a window it says that there is none,
    # and of kv heads that they are as many as heads.
    says = ("sliding_window", "num_key_value_heads")
    given = {k: v for k, v in config.items() if v is not None or k in says}
    config = {**family.defaults, **given}
    _check_types(config, where)
    if "num_local_experts" in config:  # transformers 5 writes Qwen's number of experts so
        config.setdefault("num_experts", config["num_local_experts"])
    keys = {**COMMON_KEYS, **family.keys}
    for key, value in {**CAUSAL, **family.extra}.items():
        if config.get(key, value) != value:
            raise ConfigError(f"{key} {config[key]!r} is not supported", where=where)
    derived = _derived(config, keys, where)
    found: dict[str, Any] = {}
    for ours, theirs in keys.items():
        value = config.get(theirs)
        value = derived.get(ours) if value is None else value
        if ours not in ("activation", "norm_eps", "normalize_top_k"):
            value = _whole_number(theirs, value, where)
        found[ours] = value
    found["norm_eps"] = float(found["norm_eps"])
    found["activation"] = _activation(str(model_type), found["activation"], where)
    return ModelSpec(
        name=name,
        family=str(model_type),
        tied_embedding=bool(config.get("tie_word_embeddings", False)) and head == "lm",
        head=head,
        source=where,
        sliding_window=_window(
            config, str(model_type), found["num_layers"], found["max_positions"], where
        ),
        **_rope(config, found["max_positions"], where),
        **{**_biases(config, str(model_type)), **found, **family.fixed},
    )


_NUMBERS = (
    "max_position_embeddings", "max_window_layers", "num_hidden_layers", "rms_norm_eps",
    "layer_norm_epsilon", "rope_theta", "sliding_window", "original_max_position_embeddings",
)  # fmt: skip
_ROPES = ("rope_parameters", "rope_scaling")


def _check_types(config: Mapping[str, Any], where: str) -> None:
    """Raise ``ConfigError`` where a field that is computed with is of another type."""
    for key in _NUMBERS:
        if config.get(key) is not None and not _is_number(config[key]):
            raise ConfigError(f"{key} is {config[key]!r}", where=where, remedy="give a number")
    for key in _ROPES:
        rope = config.get(key) or {}
        if not isinstance(rope, Mapping):
            raise ConfigError(f"{key} is {rope!r}", where=where, remedy="give an object or null")
        for name, value in rope.items():
            if name in ROPE_KEYS.values() and value is not None and not _is_number(value):
                raise ConfigError(f"{name} is {value!r}", where=f"{where}: {key}")
            if name == "rope_theta" and value is not None and not _is_number(value):
                raise ConfigError(f"{name} is {value!r}", where=f"{where}: {key}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _whole_number(key: str, value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}", where=where, remedy="it must be a whole number")
    return value


def _derived(config: Mapping[str, Any], keys: Mapping[str, str], where: str) -> dict[str, Any]:
    """What a field is where the file leaves it out: as many kv heads as heads, and so on."""
    hidden = _whole_number(keys["hidden"], config.get(keys["hidden"]), where)
    num_heads = _whole_number(keys["num_heads"], config.get(keys["num_heads"]), where)
    return {
        "num_kv_heads": num_heads,
        "head_dim": hidden // max(num_heads, 1),
        "ffn": 4 * hidden if keys["ffn"] == "n_inner" else None,
        "norm_eps": 1e-6,
        "activation": "silu",
    }


def _activation(model_type: str, name: Any, where: str) -> Activation:
    # Gemma's first configs say gelu and mean its approximation.
    if model_type == "gemma" and name == "gelu":
        return "gelu_tanh"
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigError(
            f"the activation {name!r} is not supported",
            where=where,
            remedy=f"supported: {', '.join(ACTIVATIONS)}",
        )
    return ACTIVATIONS[name]


def _biases(config: Mapping[str, Any], model_type: str) -> dict[str, bool]:
    """``attention_bias`` is a bias of q, k, v and o, in families that have such a field."""
    reads = model_type in ("gemma", "llama", "qwen3", "qwen3_moe")
    bias = reads and bool(config.get("attention_bias"))
    ffn_bias = model_type == "llama" and bool(config.get("mlp_bias"))
    return {"qkv_bias": bias, "o_bias": bias, "ffn_bias": ffn_bias}


def _slides(config: Mapping[str, Any], model_type: str, layer: int) -> bool:
    """Whether the window is this layer's, by the family's rule in transformers' config class."""
    first = config.get("max_window_layers", 0)
    if model_type == "qwen2_moe":
        return layer % 2 == 0 and layer < first
    if model_type in ("qwen2", "qwen3"):
        return bool(layer >= first)
    return model_type in ("mistral", "mixtral", "phi3", "qwen3_moe")


def _window(
    config: Mapping[str, Any], model_type: str, num_layers: int, longest: int, where: str
) -> int:
    """The sliding window of all layers, 0 where none binds."""
    window = config.get("sliding_window") or 0
    if model_type.startswith("qwen") and not config.get("use_sliding_window", False):
        window = 0
    # A wrong number of layers is ModelSpec's to refuse; here it is only not walked through.
    layers = range(min(num_layers, MAX_LAYERS))
    kinds = {_KINDS[bool(window) and _slides(config, model_type, layer)] for layer in layers}
    key, given = "max_window_layers", config.get("layer_types")
    if given is not None:
        key = "layer_types"
        if not isinstance(given, list) or len(given) != num_layers:
            raise ConfigError("not a list with an entry per layer", where=f"{where}: {key}")
        said = {str(kind) for kind in given}
        # Where transformers does not read them they must say what it does.
        kinds = said if model_type in READ_LAYER_TYPES else kinds | said
    if kinds <= {_KINDS[False]} or (kinds <= set(_KINDS) and window >= longest):
        return 0
    if kinds == {_KINDS[True]} and window:
        return _whole_number("sliding_window", window, where)
    raise ConfigError(
        f"layers of {' and '.join(sorted(kinds))} with a sliding window of {window} tokens "
        "are not supported",
        where=f"{where}: {key}",
        remedy=f"all layers must be of {_KINDS[False]}, or all of {_KINDS[True]} with a window",
    )


def _rope(config: Mapping[str, Any], longest: int, where: str) -> dict[str, Any]:
    """Theta and scaling; transformers 5 writes ``rope_parameters``, earlier ones two fields."""
    # Which of them wins, and what is taken where a value is absent, is as in transformers 5.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("heads that are rotated in part are not supported", where=where)
    theta = rope.get("rope_theta")
    theta = float(config.get("rope_theta", 10000.0) if theta is None else theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    for key, plain in (("truncate", True), ("mscale", None), ("mscale_all_dim", None)):
        if rope.get(key, plain) != plain:
            raise ConfigError(f"rope's {key} is not supported", where=f"{where}: rope_scaling")
    given = {ours: rope[theirs] for ours, theirs in ROPE_KEYS.items() if rope.get(theirs)}
    if kind in ("llama3", "yarn"):
        given.setdefault("original_positions", longest)
        if (positions := config.get("original_max_position_embeddings")) is not None:
            given["original_positions"] = positions
    here = f"{where}: rope_scaling"
    try:
        return {"rope_theta": theta, "rope_scaling": RopeScaling(kind=kind, **given)}
    except TypeError:
        raise ConfigError("rope scaling without a factor", where=here) from None
    except ConfigError as error:
        raise ConfigError(error.problem, where=here, remedy=error.remedy) from None


# ---- writing ----------------------------------------------------------------------------------


def hf_config(spec: ModelSpec) -> dict[str, Any]:
    """config.json of ``spec`` from its shape alone: what transformers needs to open the weights."""
    family = FAMILIES[spec.family]
    keys = {**COMMON_KEYS, **family.keys}
    fields = {theirs: getattr(spec, ours) for ours, theirs in keys.items() if theirs}
    names = {ours: theirs for theirs, ours in reversed(list(ACTIVATIONS.items()))}
    names["gelu_tanh"] = "gelu_new" if spec.family == "gpt2" else "gelu_pytorch_tanh"
    fields[keys["activation"]] = names[spec.activation]
    fields |= {"model_type": spec.family, **family.extra}
    # Of a shape no token is known; transformers would take the family's first checkpoint's.
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if spec.positions == "rope":
        rope = {"rope_type": "default", "rope_theta": spec.rope_theta, **_rope_fields(spec)}
        # Version 5 of transformers reads the first, earlier ones the others.
        fields |= {"rope_parameters": rope, "rope_theta": spec.rope_theta}
        if spec.rope_scaling is not None:
            fields["rope_scaling"] = rope
    if "qkv_bias" not in family.fixed:
        fields |= {"attention_bias": spec.o_bias, "mlp_bias": spec.ffn_bias}
    fields["sliding_window"] = spec.sliding_window or None
    if spec.family.startswith("qwen"):
        fields |= {"use_sliding_window": bool(spec.sliding_window), "max_window_layers": 0}
    if spec.sliding_window and spec.family in READ_LAYER_TYPES:
        fields["layer_types"] = [_KINDS[True]] * spec.num_layers
    return fields


def _rope_fields(spec: ModelSpec) -> dict[str, Any]:
    scaling = spec.rope_scaling
    if scaling is None:
        return {}
    values = {ROPE_KEYS[ours]: getattr(scaling, ours) for ours in ROPE_FIELDS[scaling.kind]}
    return {"rope_type": scaling.kind, **{key: value for key, value in values.items() if value}}
