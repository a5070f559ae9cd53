"""Protects the benchmark beside TRL: texts have the lengths it says, in the model's own tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}<end>{{ m.role }} {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<end>assistant {% endif %}"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny llama with a byte-level tokenizer; few words are one token of it."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], show_progress=False)
    pieces.train_from_iterator(["w2 red red blue blue one one two two"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, eos_token="<end>", pad_token="<end>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def data_of(model: Path, folder: Path) -> dict[str, object]:
    """What ``write_data`` gives for a model: lengths in tokens, and the settings' prompt_len."""
    code = (
        "import json, bench_algorithms as b; from transformers import AutoTokenizer as T;"
        f"s = b.write_data(b.Settings(model={str(model)!r}, data={str(folder)!r}, prompt_len=7));"
        f"t = T.from_pretrained({str(model)!r});"
        f"rows = [json.loads(r) for r in open({str(folder / 'pairs.jsonl')!r})];"
        "size = lambda key: sorted({len(t(r[key])['input_ids']) for r in rows});"
        "print(json.dumps({k: size(k) for k in ('prompt', 'chosen')} | {'len': s.prompt_len}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY / "scripts", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_texts_are_counted_in_tokens(model: Path, tmp_path: Path) -> None:
    """31 tokens of an answer leave one for the end."""
    assert data_of(model, tmp_path / "data") == {"prompt": [7], "chosen": [31], "len": 7}


def test_a_chat_model_is_asked_questions(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text(TEMPLATE)
    found = data_of(model, tmp_path / "data")
    lengths = found["prompt"]
    assert isinstance(lengths, list)
    assert lengths[0] < lengths[-1] == found["len"]
    first = json.loads((tmp_path / "data" / "prompts.jsonl").read_text().splitlines()[0])
    assert first["prompt"].startswith("<end>user ")


@pytest.mark.slow
def test_a_row_of_two_processes(model: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "scripts" / "bench_algorithms.py")]
    words = ["--algorithms", "grpo", "--processes", "2", "--steps", "2", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--model", str(model), *words], cwd=REPOSITORY, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    header, row = done.stdout.splitlines()
    assert header.split() == ["algorithm", "ours", "TRL", "TRL", "/", "ours"]
    assert row.startswith("grpo ")
    assert "answers of " in row
