"""Protects the executor's benchmark: its parts find each other, and both sides compute the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.spawn import free_port

REPOSITORY = Path(__file__).parents[2]


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "scripts" / "bench_executor.py"), *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    done = bench("--model", str(tmp_path))
    assert done.returncode == 2
    assert "is no model folder; run scripts/get_smollm2.py" in done.stderr


@pytest.mark.slow
def test_a_training_step_beside_ddp(tmp_path: Path) -> None:
    """The first losses are compared before anything is timed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    words = ["--only", "training", "--repeats", "1", "--port", str(free_port())]
    done = bench("--model", str(tmp_path), *words)
    assert done.returncode == 0, done.stderr
    header, row = done.stdout.splitlines()
    assert header.split() == ["subject", "ours", "beside", "takes", "ratio"]
    assert row.startswith("training step ")
    assert "first loss" in row
