"""Prompts with a verifier: any task of the package reasoning-gym, whose answers are one word.

    pip install reasoning-gym
    python scripts/reasoning_gym_task.py FOLDER [--task chain_sum] [--examples 400]
    realplan search --algorithm grpo --model models/smollm2-135m --cluster local --gpus 2 \\
        reward.source=scripts/reasoning_gym_task.py:score -o plan.json ...
    realexec run plan.json data.path=FOLDER/prompts.jsonl eval_data.path=FOLDER/eval_prompts.jsonl

Writes FOLDER/prompts.jsonl and FOLDER/eval_prompts.jsonl (a tenth as many, of another seed). A line
keeps what the verifier needs; ``score`` is its reward, in [0, 1].
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def score(prompt: str, answer: str, record: Mapping[str, Any]) -> float:
    """The verifier's score of the answer's last word, without a full stop."""
    import reasoning_gym

    words = answer.split()
    entry = {"question": prompt, "answer": record["truth"], "metadata": record["metadata"]}
    verify = reasoning_gym.get_score_answer_fn(record["metadata"]["source_dataset"])
    return float(verify(words[-1].rstrip(".") if words else "", entry))


def write(file: Path, task: str, *, examples: int, seed: int) -> None:
    """``examples`` lines of a task; the verifier's own answer is ``truth``."""
    import reasoning_gym

    rows = [
        {"prompt": entry["question"], "truth": entry["answer"], "metadata": entry["metadata"]}
        for entry in reasoning_gym.create_dataset(task, size=examples, seed=seed)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write prompts of a reasoning-gym task.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", default="chain_sum", help="default chain_sum")
    parser.add_argument("--examples", type=int, default=400, help="default 400")
    args = parser.parse_args()
    write(args.folder / "prompts.jsonl", args.task, examples=args.examples, seed=1)
    evaluated = max(1, args.examples // 10)
    write(args.folder / "eval_prompts.jsonl", args.task, examples=evaluated, seed=2)
    print(f"wrote {args.folder}: prompts, eval_prompts of {args.task}")


if __name__ == "__main__":
    main()
