"""Protects what a run takes for a role's weights: the planned model, computed as planned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel

from executor import cli
from scripts.toy_task import write_data, write_model


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_model(folder / "model", seed=1)
    write_data(folder, seed=1, examples=4)
    return folder


def run(toy: Path, output: Path, *words: str) -> int:
    argv = ["run", "--layout", "d1p1m1", "--algorithm", "grpo", "--model", str(toy / "model")]
    argv += ["batch_size=4", "prompt_len=8", "response_len=6", "samples_per_prompt=2"]
    return cli.main([*argv, f"data.path={toy}/prompts.jsonl", *words, "-o", str(output)])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_act", "gelu", "activation gelu instead of silu"),
        ("rms_norm_eps", 0.01, "norm_eps 0.01 instead of"),
        ("rope_parameters", {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
         "rope_scaling RopeScaling(kind='linear', factor=4.0"),
        ("tie_word_embeddings", False, "tied_embedding False instead of True"),
    ],
)  # fmt: skip
def test_weights_that_are_computed_otherwise_are_refused(
    field: str, value: Any, said: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same shapes: nothing else would tell."""
    other = tmp_path / "other"
    shutil.copytree(toy / "model", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, field: value}))
    assert run(toy, tmp_path / "out", f"actor.path={other}") == 2
    assert f"{other} is not the planned model: {said}" in capsys.readouterr().err


def test_a_reward_model_without_its_head_is_refused(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decoder that is saved alone: scores of a random head would train the actor."""
    AutoModel.from_pretrained(toy / "model").save_pretrained(tmp_path / "bare")
    words = ["reward.source=model", f"reward.path={tmp_path}/bare"]
    assert run(toy, tmp_path / "out", *words) == 2
    assert "has no head that scores, no tensor score.weight" in capsys.readouterr().err
