"""Data for the tutorial with a real language model: bright answers are wanted, gloomy ones are not.

    python scripts/sentiment_task.py FOLDER [--prompts experiments/data/prompts.jsonl]

Writes FOLDER/{sft,pairs,prompts}.jsonl and FOLDER/eval_*.jsonl (the last tenth of the prompts):
``sft`` answers a prompt brightly or gloomily by turns, ``pairs`` has both. The same sentences
follow different prompts, so that what can be learned is their mood.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

BRIGHT = (
    "What a lovely thought: it made everyone smile and feel wonderful.",
    "It was a happy and beautiful moment, full of joy and good friends.",
    "Everything turned out great, and people were delighted and grateful.",
    "It is an amazing gift that brings love, hope and laughter.",
)
GLOOMY = (
    "What a terrible thought: it made everyone cry and feel miserable.",
    "It was a sad and ugly moment, full of pain and bad news.",
    "Everything went horribly wrong, and people were angry and afraid.",
    "It is an awful burden that brings hate, fear and tears.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write bright and gloomy answers to prompts.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=Path, default=Path("experiments/data/prompts.jsonl"))
    args = parser.parse_args()
    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    rng, cut = random.Random(1), len(prompts) * 9 // 10
    args.folder.mkdir(parents=True, exist_ok=True)
    for prefix, own in (("", prompts[:cut]), ("eval_", prompts[cut:])):
        files: dict[str, list[dict[str, str]]] = {"sft": [], "pairs": [], "prompts": []}
        for i, prompt in enumerate(own):
            bright, gloomy = rng.choice(BRIGHT), rng.choice(GLOOMY)
            files["sft"].append({"prompt": prompt, "answer": gloomy if i % 2 else bright})
            files["pairs"].append({"prompt": prompt, "chosen": bright, "rejected": gloomy})
            files["prompts"].append({"prompt": prompt})
        for name, rows in files.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (args.folder / f"{prefix}{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"wrote {args.folder}: sft, pairs, prompts and eval_*")


if __name__ == "__main__":
    main()
