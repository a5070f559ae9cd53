"""Seconds of a training step of every algorithm, beside TRL's at equal settings, on this CPU.

    python scripts/bench_algorithms.py --trl-python PATH [--algorithms sft,grpo] [--processes 2]
    python scripts/bench_algorithms.py --trl-python PATH --algorithms grpo --processes 2 \\
        --model models/smollm2-135m --response-len 64

PATH is a Python of an environment of its own with `trl` (1.16 has SFT, reward modelling, DPO, GRPO
and RLOO; the others are measured alone). Both train one and the same model in float32, on the same
texts, in as many processes (data parallel over gloo) of as many threads, one micro-batch, AdamW
and, where a method has one, a reference model; answers have the same longest length. Runs
alternate, and the median step of all repeats counts. Prints a table with the ratio TRL / ours:
above 1 ours is faster; then the mean tokens of the answers sampled, of our runs and of TRL's.

The default model is a random llama of 22 million parameters, which never ends an answer, and texts
are random words. `--model FOLDER` takes another; where its tokenizer has a chat template, it is
asked questions, and answers end at its stop token. Answers of the data (SFT, reward, DPO) all have
the longest length, so that padding costs TRL nothing; with `--unequal` a quarter of it to all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from executor_benches.questions import PROMPTS

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_WORDS = 8192
KL = 0.04


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of both sides: ``batch_size`` prompts (pairs, examples) a step, lengths in tokens."""

    model: str
    data: str  # a folder with answers.jsonl, pairs.jsonl, prompts.jsonl
    batch_size: int = 8
    samples_per_prompt: int = 4
    prompt_len: int = 32
    response_len: int = 32
    steps: int = 4
    processes: int = 1
    threads: int = 2  # of each process
    equal_lengths: bool = True


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Of all steps but a run's first: seconds, and the mean tokens of the answers sampled."""

    seconds: list[float]
    answer_tokens: list[float]


# Ours: our algorithm, its data, its options.
_REWARD = ["reward.source=experiments.rewards:share_of_even_tokens"]
OURS: Mapping[str, tuple[str, str, Sequence[str]]] = {
    "sft": ("sft", "answers", ()),
    "reward": ("reward", "pairs", ()),
    "dpo": ("dpo", "pairs", ()),
    "grpo": ("grpo", "prompts", [f"grpo.kl_coef={KL}", *_REWARD]),
    "rloo": (
        "reinforce",
        "prompts",
        ["reinforce.baseline=leave_one_out", f"reinforce.kl_coef={KL}", *_REWARD],
    ),
    "reinforce": ("reinforce", "prompts", _REWARD),
    "remax": ("remax", "prompts", _REWARD),
    "raft": ("raft", "prompts", _REWARD),
    "ppo": ("ppo", "prompts", ["ppo.num_mini_batches=1", *_REWARD]),
}
TRL = ("sft", "reward", "dpo", "grpo", "rloo")
SAMPLED = ("grpo", "rloo", "reinforce", "remax", "raft", "ppo")


# ---- model and data ---------------------------------------------------------------------------


def write_model(folder: Path) -> None:
    """A random llama whose tokenizer has a token for each of ``NUM_WORDS`` words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<end>", "<pad>", *(f"w{i}" for i in range(2, NUM_WORDS))]
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    config = LlamaConfig(
        vocab_size=NUM_WORDS, hidden_size=512, intermediate_size=1408, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<pad>", unk_token="<pad>"
    ).save_pretrained(folder)


def write_data(settings: Settings) -> Settings:
    """Texts of one-token words, or a chat model's questions; with ``prompt_len`` as they have it.

    Answers have the longest length, or a quarter of it to all. Chat templates are applied here.
    """
    from transformers import AutoTokenizer

    rng = random.Random(1)
    tokenizer: Any = AutoTokenizer.from_pretrained(settings.model)
    words = one_token_words(tokenizer)
    least = settings.response_len if settings.equal_lengths else settings.response_len // 4
    asked = chat_questions(tokenizer) if tokenizer.chat_template else []
    files: dict[str, list[dict[str, str]]] = {"answers": [], "pairs": [], "prompts": []}

    def text(length: int) -> str:
        return " ".join(rng.choices(words, k=length))

    longest = 0
    for _ in range(settings.batch_size * (settings.steps + 1)):
        prompt = rng.choice(asked) if asked else text(settings.prompt_len)
        longest = max(longest, len(tokenizer(prompt)["input_ids"]))
        # One token is the end.
        good, bad = (text(rng.randint(least, settings.response_len) - 1) for _ in range(2))
        files["prompts"].append({"prompt": prompt})
        files["answers"].append({"prompt": prompt, "answer": good})
        files["pairs"].append({"prompt": prompt, "chosen": good, "rejected": bad})
    Path(settings.data).mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (Path(settings.data) / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return replace(settings, prompt_len=longest)


def one_token_words(tokenizer: Any) -> list[str]:
    """Up to ``NUM_WORDS`` words that are one token each, alone and after a space."""
    found = []
    for token in range(len(tokenizer)):
        word = tokenizer.decode([token]).strip()
        if word.isalnum() and word.isascii() and token not in tokenizer.all_special_ids:
            pieces = tokenizer([word, f"{word} {word}"], add_special_tokens=False)["input_ids"]
            if [len(ids) for ids in pieces] == [1, 2]:
                found.append(word)
        if len(found) == NUM_WORDS:
            break
    return found


def chat_questions(tokenizer: Any) -> list[str]:
    """The questions of ``bench_executor.py``, through the chat template."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in PROMPTS
    ]  # fmt: skip


# ---- ours -------------------------------------------------------------------------------------


def measure_ours(name: str, settings: Settings, folder: Path) -> Steps:
    """A run of ``realexec``."""
    algorithm, data, options = OURS[name]
    words = [
        f"batch_size={settings.batch_size}", f"prompt_len={settings.prompt_len}",
        f"response_len={settings.response_len}", f"total_steps={settings.steps}",
        f"data.path={settings.data}/{data}.jsonl", "data.chat_template=false", *options,
    ]  # fmt: skip
    if name in SAMPLED:
        words += [f"samples_per_prompt={settings.samples_per_prompt}"]
    layout = f"d{settings.processes}p1m1"
    command = [sys.executable, "-m", "executor.cli", "run", "--layout", layout]
    command += ["--model", settings.model, "--algorithm", algorithm, "-o", str(folder), *words]
    _run(command, settings, path=str(REPOSITORY))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines[1:]]
    tokens = "actor_gen/response_tokens"
    return Steps(
        seconds=[step["step_s"] for step in steps],
        answer_tokens=[step[tokens] for step in steps if tokens in step],
    )


def _run(command: Sequence[str], settings: Settings, *, path: str | None) -> str:
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    environment.pop("PYTHONPATH", None)
    if path:
        environment["PYTHONPATH"] = path
    done = subprocess.run(list(command), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench_algorithms: {' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


# ---- TRL's (runs under --trl-python) ----------------------------------------------------------


def measure_trl(name: str, settings: Settings) -> Steps:
    """A run of TRL's trainer; answers are those of this process."""
    import torch
    import trl
    from datasets import load_dataset
    from transformers import TrainerCallback

    torch.set_num_threads(settings.threads)
    ends: list[float] = []
    lengths: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **more: Any) -> None:
            ends.append(time.perf_counter())

    sampled = name in SAMPLED
    rows = settings.batch_size * (settings.samples_per_prompt if sampled else 1)
    common = {
        "output_dir": tempfile.mkdtemp(), "use_cpu": True, "bf16": False, "report_to": "none",
        "per_device_train_batch_size": rows // settings.processes, "max_steps": settings.steps,
        "ddp_backend": "gloo", "save_strategy": "no", "logging_strategy": "no", "seed": 1,
        "disable_tqdm": True, "gradient_checkpointing": False, "learning_rate": 1e-5,
        "model_init_kwargs": {"dtype": "float32"},
    }  # fmt: skip
    files = {"sft": "answers", "reward": "pairs", "dpo": "pairs"}
    file = f"{settings.data}/{files.get(name, 'prompts')}.jsonl"
    data = load_dataset("json", data_files=file, split="train")
    longest = settings.prompt_len + settings.response_len
    answering = {
        "num_generations": settings.samples_per_prompt, "beta": KL, "temperature": 1.0,
        "max_completion_length": settings.response_len,
    }  # fmt: skip

    def even(completions: list[str], completion_ids: list[list[int]], **more: Any) -> list[float]:
        lengths.append(fmean(len(ids) for ids in completion_ids))
        return [float(len(text) % 2 == 0) for text in completions]

    shared = {"train_dataset": data, "callbacks": [Clock()], "model": settings.model}
    trainer: Any
    if name == "sft":
        shared["train_dataset"] = data.rename_column("answer", "completion")
        trainer = trl.SFTTrainer(args=trl.SFTConfig(max_length=longest, **common), **shared)
    elif name == "reward":
        trainer = trl.RewardTrainer(args=trl.RewardConfig(max_length=longest, **common), **shared)
    elif name == "dpo":
        trainer = trl.DPOTrainer(args=trl.DPOConfig(max_length=longest, **common), **shared)
    elif name == "grpo":
        grpo = trl.GRPOConfig(loss_type="grpo", **answering, **common)
        trainer = trl.GRPOTrainer(args=grpo, reward_funcs=even, **shared)
    else:
        rloo = trl.RLOOConfig(**answering, **common)
        trainer = trl.RLOOTrainer(args=rloo, reward_funcs=even, **shared)
    trainer.train()
    return Steps(seconds=[b - a for a, b in itertools.pairwise(ends)], answer_tokens=lengths[1:])


# ---- side by side -----------------------------------------------------------------------------


def compare(names: Sequence[str], settings: Settings, trl_python: str, repeats: int) -> None:
    """Print a row for each algorithm as soon as it is measured."""
    print(f"{'algorithm':10} {'ours':>9} {'TRL':>9}   TRL / ours", flush=True)
    torchrun = [trl_python, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(settings.processes), str(Path(__file__).resolve())]
    for name in names:
        ours: list[Steps] = []
        theirs: list[Steps] = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                ours.append(measure_ours(name, settings, Path(folder) / "run"))
            if name in TRL and trl_python:
                half = ["--trl-half", name, json.dumps(asdict(settings))]
                said = _run([*torchrun, *half], settings, path=None)
                theirs.append(Steps(**json.loads(said.strip().splitlines()[-1])))
        our_s = median(s for steps in ours for s in steps.seconds)
        row = f"{name:10} {our_s:7.2f} s"
        if theirs:
            trl_s = median(s for steps in theirs for s in steps.seconds)
            row += f" {trl_s:7.2f} s   {trl_s / our_s:.2f}"
        tokens = [fmean(steps.answer_tokens) for steps in (*ours, *theirs) if steps.answer_tokens]
        if tokens:
            row += "        answers of " + ", ".join(f"{mean:.1f}" for mean in tokens)
        print(row, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Steps of our algorithms beside TRL's.")
    parser.add_argument("--trl-python", default="", metavar="PATH", help="a Python that has trl")
    parser.add_argument("--algorithms", default=",".join(OURS), metavar="A,B", help="default all")
    parser.add_argument("--model", default="", metavar="FOLDER", help="default a random llama")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts per step (default 8)")
    parser.add_argument("--response-len", type=int, default=32, help="at most (default 32)")
    parser.add_argument("--steps", type=int, default=4, help="of each run (default 4)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side (default 2)")
    parser.add_argument("--processes", type=int, default=1, help="of both sides (default 1)")
    parser.add_argument("--unequal", action="store_true", help="answers of data differ in length")
    parser.add_argument("--trl-half", nargs=2, metavar=("NAME", "JSON"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl_half:
        name, text = args.trl_half
        steps = measure_trl(name, Settings(**json.loads(text)))
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(asdict(steps)))
        return 0
    names = args.algorithms.split(",")
    unknown = [name for name in names if name not in OURS]
    if unknown:
        raise SystemExit(f"bench_algorithms: no {unknown[0]}; there are {', '.join(OURS)}")
    if args.batch_size % args.processes:
        raise SystemExit("bench_algorithms: --batch-size is no multiple of --processes")
    with tempfile.TemporaryDirectory() as work:
        model = args.model or str(Path(work) / "model")
        if not args.model:
            write_model(Path(model))
        settings = Settings(
            model=model, data=str(Path(work) / "data"), batch_size=args.batch_size,
            response_len=args.response_len, steps=args.steps, processes=args.processes,
            threads=max(1, (os.cpu_count() or 1) // args.processes),
            equal_lengths=not args.unequal,
        )  # fmt: skip
        compare(names, write_data(settings), args.trl_python, args.repeats)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
