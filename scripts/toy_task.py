"""A task that a small model learns on a CPU in minutes: sorting digits. Writes model and data.

    python scripts/toy_task.py FOLDER [--seed 1] [--examples 2000]

FOLDER/model is a llama of two layers with random weights and a tokenizer of whole words, as
transformers opens it. FOLDER/{sft,pairs,prompts}.jsonl hold the task as users have their data,
FOLDER/eval_{sft,pairs,prompts}.jsonl other examples of it:

    {"prompt": "sort 5 2 7 =", "answer": "2 5 7"}         half of the answers in sft.jsonl are right
    {"prompt": "sort 5 2 7 =", "chosen": "2 5 7", "rejected": "2 7 5"}

``share_in_place`` is the task's exact reward.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NUM_DIGITS = 4
WORDS = ("<end>", "<pad>", "sort", "=", *(str(digit) for digit in range(10)))


def share_in_place(prompt: str, answer: str, record: Mapping[str, Any]) -> float:
    """The share of the answer's digits that stand where they must, in [0, 1]; too many give 0."""
    wanted = sorted(prompt.split()[1:-1])
    said = answer.split()
    if len(said) > len(wanted):
        return 0.0
    return sum(a == b for a, b in zip(said, wanted, strict=False)) / len(wanted)


def write_model(folder: Path, *, seed: int, layers: int = 2, hidden: int = 64) -> None:
    """A Hugging Face folder of a random llama and its tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<pad>", unk_token="<pad>"
    )
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, eos_token_id=0, bos_token_id=None,
        pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def disordered(digits: list[str], rng: random.Random) -> list[str]:
    """All of the sorted ``digits``, in another order."""
    found = digits
    while found == digits:
        found = rng.sample(digits, len(digits))
    return found


def wrong_answer(digits: list[str], rng: random.Random) -> list[str]:
    """Disordered, or with a digit too many, one too few, or one that nobody asked for."""
    others = [str(digit) for digit in range(10) if str(digit) not in digits]
    place = rng.randrange(len(digits))
    return rng.choice(
        [
            disordered(digits, rng),
            [*digits, rng.choice(others)],
            digits[:place] + digits[place + 1 :],
            sorted([*digits[:place], rng.choice(others), *digits[place + 1 :]]),
        ]
    )


def write_data(folder: Path, *, seed: int, examples: int, prefix: str = "") -> None:
    """The three files, ``examples`` lines each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{seed} {prefix}")
    files: dict[str, list[dict[str, str]]] = {"sft": [], "pairs": [], "prompts": []}
    for _ in range(examples):
        drawn = rng.sample("0123456789", NUM_DIGITS)
        prompt, digits = f"sort {' '.join(drawn)} =", sorted(drawn)
        right, wrong = " ".join(digits), " ".join(wrong_answer(digits, rng))
        answer = right if rng.random() < 0.5 else " ".join(disordered(digits, rng))
        files["sft"].append({"prompt": prompt, "answer": answer})
        files["pairs"].append({"prompt": prompt, "chosen": right, "rejected": wrong})
        files["prompts"].append({"prompt": prompt})
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{prefix}{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a small model and a task to learn.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--examples", type=int, default=2000, help="lines a file (default 2000)")
    args = parser.parse_args()
    write_model(args.folder / "model", seed=args.seed)
    write_data(args.folder, seed=args.seed, examples=args.examples)
    write_data(args.folder, seed=args.seed, examples=128, prefix="eval_")
    print(f"wrote {args.folder}: model, sft, pairs, prompts and eval_*")


if __name__ == "__main__":
    main()
