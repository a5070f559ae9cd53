"""Protects what a user meets before any process starts: every mistake in data, tokenizers and
rewards is one sentence with file, line and remedy; and what a run tells while it goes."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, GPT2Config

from executor import cli
from executor.boards import WandB, markdown
from executor.launch import local
from scripts.toy_task import share_in_place, write_data, write_model

OPTIONS = ["batch_size=4", "prompt_len=8", "response_len=6", "samples_per_prompt=2"]
REWARD = "reward.source=tests.executor.test_inputs:exact"


def exact(prompt: str, answer: str, record: Mapping[str, Any]) -> float:
    return share_in_place(prompt, answer, record)


def broken(prompt: str, answer: str, record: Mapping[str, Any]) -> float:
    return math.nan if record["id"] == 3 else 0.0


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_model(folder / "model", seed=1)
    write_data(folder, seed=1, examples=12)
    return folder


def run(toy: Path, *words: str, algorithm: str = "grpo", layout: str = "d1p1m1") -> int:
    argv = ["run", "--layout", layout, "--algorithm", algorithm, "--model", str(toy / "model")]
    return cli.main([*argv, *OPTIONS, *words])


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*args: Any, **options: Any) -> None:
        raise AssertionError("workers were started")

    monkeypatch.setattr(local, "start", launch)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"prompt": "sort 1"}\n{"prompt"', "prompts.jsonl:2: not JSON"),
        ('{"prompt": "sort 1"}\n{"text": "x"}', "prompts.jsonl:2: prompt is None; every line"),
        ('{"prompt": "sort 1"}\n{"prompt": " "}', "prompts.jsonl:2: prompt is ' '; every line"),
        ('\n\n{"prompt": "sort 1 2 3 4 5 6 7 8 9"}', "prompts.jsonl:3: the prompt has 10 tokens, "
         "more than prompt_len=8; shorten it or search a plan with prompt_len=10"),
        ('{"prompt": "sort 1"}\n{"prompt": "\udce4"}', "prompts.jsonl:2: not UTF-8; save as UTF-8"),
        ("", "prompts.jsonl: no examples in it"),
    ],
)  # fmt: skip
def test_bad_data_is_named_before_any_process(
    text: str, sentence: str, toy: Path, tmp_path: Path, no_processes: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file, output = tmp_path / "prompts.jsonl", tmp_path / "out"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert run(toy, REWARD, f"data.path={file}", "-o", str(output)) == 2
    assert sentence in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["reward.source=no_such_module:f"], "no module 'no_such_module'"),
        (["reward.source=vader+nonsense"], "reward.source=nonsense: not a reward; use model, "),
        ([REWARD, "eval_every=2"], "eval_every: there is nothing to evaluate on; give eval_data"),
        ([REWARD, "eval_every=2", "eval_data.path={toy}/prompts.jsonl", "batch_size=13"],
         "prompts.jsonl: has 12 examples, fewer than batch_size=13"),
        ([REWARD, "init=random"], "random weights have no tokenizer to read it with"),
        ([REWARD, "wandb_project=mine"], "wandb_project: wandb is not installed"),
    ],
)  # fmt: skip
def test_other_mistakes_are_named_before_any_process(
    words: list[str], sentence: str, toy: Path, tmp_path: Path, no_processes: None,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = [word.format(toy=toy) for word in words]
    assert run(toy, f"data.path={toy}/prompts.jsonl", *words, "-o", str(tmp_path / "out")) == 2
    assert sentence in capsys.readouterr().err


def test_a_reward_model_that_means_other_tokens_is_refused(
    toy: Path, tmp_path: Path, no_processes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    write_model(other, seed=2)
    model = AutoModelForSequenceClassification.from_pretrained(other, num_labels=1)
    model.save_pretrained(other)
    words = [f"data.path={toy}/prompts.jsonl", f"reward.path={other}", "-o", str(tmp_path / "out")]
    with pytest.raises(AssertionError, match="workers were started"):  # the same words: all is well
        run(toy, *words)
    tokens = json.loads((other / "tokenizer.json").read_text())
    tokens["model"]["vocab"] |= {"3": 9, "5": 7}
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    capsys.readouterr()
    assert run(toy, *words) == 2
    printed = capsys.readouterr().err
    assert "reward.path: its tokenizer is not actor's: '3' is token 9 of" in printed
    assert "7 of" in printed
    assert "use a reward model of actor's family" in printed


def model_of(toy: Path, folder: Path, **config: Any) -> Path:
    """The toy's folder with another configuration; its weights are not looked at."""
    shutil.copytree(toy / "model", folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**saved, **config}))
    return folder


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
    other = model_of(toy, tmp_path / "other", **{field: value})
    words = [REWARD, f"data.path={toy}/prompts.jsonl", f"actor.path={other}"]
    assert run(toy, *words, "-o", str(tmp_path / "out")) == 2
    assert f"{other} is not the planned model: {said}" in capsys.readouterr().err


def test_a_reward_model_without_its_head_is_refused(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decoder that is saved alone: scores of a random head would train the actor."""
    AutoModel.from_pretrained(toy / "model").save_pretrained(tmp_path / "bare")
    words = [f"data.path={toy}/prompts.jsonl", f"reward.path={tmp_path}/bare"]
    assert run(toy, *words, "reward.source=model", "-o", str(tmp_path / "out")) == 2
    assert "has no head that scores, no tensor score.weight" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{nonsense", "[]", '{"model": {"type": "BPE", "vocab": {}}}'])
def test_a_damaged_tokenizer_is_named_before_any_process(
    text: str, toy: Path, tmp_path: Path, no_processes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = model_of(toy, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text(text)
    assert start(f"data.path={toy}/prompts.jsonl", algorithm="generation", model=damaged) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"realexec: {damaged}")


def start(*words: str, algorithm: str, model: Path, critic: Path | None = None) -> int:
    argv = ["run", "--layout", "d1p1m1", "--algorithm", algorithm, "--model", str(model)]
    return cli.main([*argv, "--critic", str(critic or model), *words, "batch_size=4"])


def test_a_token_of_the_data_outside_a_vocabulary_is_refused(
    toy: Path, tmp_path: Path, no_processes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """With tp the embedding would take it for zeros."""
    small = model_of(toy, tmp_path / "small", vocab_size=13)  # the last word is 9
    nine, two = tmp_path / "nine.jsonl", tmp_path / "two.jsonl"
    nine.write_text('{"prompt": "sort", "answer": "2"}\n{"prompt": "sort", "answer": "9"}\n')
    two.write_text('{"prompt": "sort", "answer": "2"}\n')
    assert start(f"data.path={nine}", algorithm="sft", model=small) == 2
    printed = capsys.readouterr().err
    assert f"its vocabulary has 13 tokens, which token 13 ({nine}:2) is not among" in printed
    words = [f"data.path={two}", "eval_every=1", f"eval_data.path={nine}", "batch_size=1"]
    argv = ["run", "--layout", "d1p1m1", "--algorithm", "sft", "--model", str(small)]
    assert cli.main([*argv, *words]) == 2
    assert f"token 13 ({nine}:2)" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="workers were started"):
        start(f"data.path={two}", algorithm="sft", model=small)


def test_who_reads_answers_must_know_every_token_of_them(
    toy: Path, tmp_path: Path, no_processes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Vocabularies may be padded in different ways: no more tokens than the tokenizer's count."""
    data = tmp_path / "two.jsonl"
    data.write_text('{"prompt": "sort 2"}\n')
    small = model_of(toy, tmp_path / "small", vocab_size=13)
    padded = model_of(toy, tmp_path / "padded", vocab_size=32)
    words, model = [REWARD, f"data.path={data}"], toy / "model"
    assert start(*words, algorithm="ppo", model=model, critic=small) == 2
    assert (
        "critic.path: its vocabulary has 13 tokens, which token 13 (which actor may generate) is "
        "not among" in capsys.readouterr().err
    )
    for actor, critic in ((model, padded), (padded, model), (small, small)):
        with pytest.raises(AssertionError, match="workers were started"):
            start(*words, algorithm="ppo", model=actor, critic=critic)
    random = [REWARD, "init=random", "prompt_len=8", "response_len=8"]
    with pytest.raises(AssertionError, match="workers were started"):
        start(*random, algorithm="ppo", model=small, critic=padded)
    assert start(*random, algorithm="ppo", model=padded, critic=model) == 2
    assert "which token 31 (which actor may generate)" in capsys.readouterr().err


def learned(toy: Path, folder: Path, positions: int) -> Path:
    """A model with ``positions`` learned positions."""
    model_of(toy, folder)
    config = GPT2Config(
        vocab_size=14, n_positions=positions, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder


def test_sequences_longer_than_learned_positions_are_refused(
    toy: Path, tmp_path: Path, no_processes: None, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Prompts of 6 tokens, right answers of 4 and an end; rotary positions go on, with a line."""
    few = learned(toy, tmp_path / "few", 10)
    words = [f"data.path={toy}/pairs.jsonl"]
    assert start(*words, algorithm="dpo", model=few) == 2
    assert re.search(
        r"pairs\.jsonl:\d+: a sequence of 12 tokens, but (ref|actor) has 10 positions; shorten it",
        capsys.readouterr().err,
    )
    rotary = model_of(toy, tmp_path / "rotary", max_position_embeddings=10)
    enough = learned(toy, tmp_path / "enough", 12)
    for model in (enough, rotary):
        assert not caplog.messages
        with pytest.raises(AssertionError, match="workers were started"):
            start(*words, algorithm="dpo", model=model)
    (line,) = caplog.messages
    assert line.startswith("sequences of up to 12 tokens are longer than those that ref, actor was")


def test_prompts_and_answers_meet_the_ends_of_positions_before_any_process(
    toy: Path, tmp_path: Path, no_processes: None, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    words, sizes = [REWARD, f"data.path={toy}/prompts.jsonl"], (6, 8, 12)
    six, eight, twelve = (learned(toy, tmp_path / f"of{n}", n) for n in sizes)
    assert start(*words, "response_len=6", algorithm="ppo", model=six) == 2
    assert re.search(
        r"prompts\.jsonl:\d+: a prompt of 6 tokens leaves no room for an answer in the 6 ",
        capsys.readouterr().err,
    )
    assert start(*words, "response_len=6", algorithm="ppo", model=twelve, critic=eight) == 2
    assert "a sequence of 12 tokens, but critic has 8 positions" in capsys.readouterr().err
    for model in (twelve, eight):
        assert not caplog.messages
        with pytest.raises(AssertionError, match="workers were started"):
            start(*words, "response_len=6", algorithm="ppo", model=model)
    (line,) = caplog.messages
    assert line == (
        "answers are cut at the 8 positions of actor: prompts of up to 6 tokens and "
        "response_len=6 make 12"
    )


def test_a_pass_answers_every_prompt_once_though_its_last_batch_is_filled(
    toy: Path, tmp_path: Path
) -> None:
    """12 prompts in batches of 5."""
    words = [f"data.path={toy}/prompts.jsonl", "total_epochs=1", "batch_size=5"]
    argv = [*words, "samples_per_prompt=1", "-o", str(tmp_path)]
    assert run(toy, *argv, algorithm="generation") == 0
    answers = [row for file in (tmp_path / "answers").iterdir() for row in lines(file)]
    assert sorted(row["id"] for row in answers) == list(range(1, 13))
    assert set(answers[0]) == {"id", "prompt", "answer", "sample", "finished"}


def test_a_reward_that_is_no_number_names_the_prompts_line(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reward.source=tests.executor.test_inputs:broken", "total_epochs=1"]
    assert run(toy, f"data.path={toy}/prompts.jsonl", *words, "-o", str(tmp_path / "out")) == 2
    assert "prompts.jsonl:3: the reward of sample 3 is nan; rewards must be" in (
        capsys.readouterr().err
    )


def test_a_reward_model_that_finds_no_number_names_a_line(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(toy / "model", num_labels=1)
    torch.nn.init.constant_(model.score.weight, math.nan)
    model.save_pretrained(tmp_path / "reward")
    words = [f"reward.path={tmp_path}/reward", f"data.path={toy}/prompts.jsonl"]
    assert run(toy, *words, "-o", str(tmp_path / "out")) == 2
    assert re.search(
        r"prompts\.jsonl:\d+: rew_inf finds rewards nan for an answer to this prompt; mend the "
        r"line, or the weights of reward",
        capsys.readouterr().err,
    )


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_evaluates_and_shows_answers_and_its_training_never_notices(
    toy: Path, tmp_path: Path
) -> None:
    """Under two layouts, on a data set saved by datasets, and without evaluation."""
    datasets = pytest.importorskip("datasets")
    saved = tmp_path / "saved"
    rows = [{"prompt": row["prompt"]} for row in lines(toy / "prompts.jsonl")]
    datasets.Dataset.from_list(rows).save_to_disk(str(saved))
    words = [REWARD, f"data.path={saved}", "total_epochs=2", "actor.lr=1e-2", "grpo.kl_coef=0"]
    telling = [f"eval_data.path={toy}/prompts.jsonl", "eval_every=2", "samples_every=3",
               "num_samples=3"]  # fmt: skip
    outputs = [tmp_path / name for name in ("told", "split", "quiet")]
    assert run(toy, *words, *telling, "-o", str(outputs[0])) == 0
    assert run(toy, *words, *telling, "-o", str(outputs[1]), layout="d2p1m1") == 0
    assert run(toy, *words, "-o", str(outputs[2])) == 0
    told, split, quiet = (lines(output / "metrics.jsonl") for output in outputs)
    assert len(told) == 2 * 12 / 4
    evaluated = [line["step"] for line in told if "eval/rew_inf/rewards" in line]
    assert evaluated == [1, 3, 5]
    for one, two, three in zip(told, split, quiet, strict=True):
        for name, value in three.items():
            if name != "step_s":
                assert one[name] == value, name
        for name in ("rew_inf/rewards", "eval/rew_inf/rewards", "eval/actor_gen/response_tokens"):
            assert one.get(name) == pytest.approx(two.get(name), abs=1e-6)
    table = lines(outputs[0] / "samples.jsonl")
    assert [(row["step"], row["sample"]) for row in table] == [
        (step, sample) for step in (0, 3) for sample in range(3)
    ]
    assert table == lines(outputs[1] / "samples.jsonl")
    for row in table:
        assert row["reward"] == pytest.approx(exact(row["prompt"], row["answer"], {}))
        assert rows[int(row["where"].rpartition(":")[2])]["prompt"] == row["prompt"]
    assert not (outputs[2] / "samples.jsonl").read_text()


def test_the_evaluation_of_a_supervised_loss_is_the_loss_of_the_weights(
    toy: Path, tmp_path: Path
) -> None:
    """With a learning rate of 0 the evaluation on the training data is the training loss."""
    words = [f"data.path={toy}/sft.jsonl", f"eval_data.path={toy}/sft.jsonl", "eval_every=1",
             "total_steps=1", "actor.lr=0", "batch_size=12"]  # fmt: skip
    argv = ["run", "--layout", "d1p2m1", "--algorithm", "sft", "--model", str(toy / "model")]
    argv += ["prompt_len=8", "response_len=8", *words, "-o", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    (line,) = lines(tmp_path / "out" / "metrics.jsonl")
    assert line["eval/actor_train/loss"] == pytest.approx(line["actor_train/loss"], rel=1e-6)


def test_several_splits_are_refused_by_name(
    toy: Path, tmp_path: Path, no_processes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"prompt": "sort 1"}])
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "both"))
    assert run(toy, REWARD, f"data.path={tmp_path}/both") == 2
    assert f"several splits (train, test); give one: {tmp_path}/both/train" in (
        capsys.readouterr().err
    )


def test_a_folder_without_datasets_is_refused(
    toy: Path, tmp_path: Path, no_processes: None, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert run(toy, REWARD, f"data.path={tmp_path}") == 2
    assert "datasets is not installed; pip install 'realplan[data]'" in capsys.readouterr().err


def test_weights_and_biases_gets_numbers_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the package, which is no dependency: what is asked of it."""
    logged: list[Any] = []
    given: dict[str, Any] = {}

    def init(**options: Any) -> SimpleNamespace:
        given.update(options)
        return SimpleNamespace(
            log=lambda values, step: logged.append((step, values)),
            finish=lambda: logged.append("finished"),
        )

    table = lambda columns, data: (columns, data)  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Table=table))
    board = WandB("mine", tmp_path / "runs" / "ppo", {"seed": 1})
    board.scalars(3, {"loss": 0.5})
    board.table(3, [{"prompt": "p", "reward": 1.0}])
    board.close()
    assert (given["project"], given["id"], given["config"]) == ("mine", "runs-ppo", {"seed": 1})
    assert logged == [
        (3, {"loss": 0.5}), (3, {"samples": (["prompt", "reward"], [["p", 1.0]])}), "finished"
    ]  # fmt: skip


def test_a_table_of_answers_survives_bars_and_line_breaks() -> None:
    assert markdown([{"answer": "a|b\nc"}]) == "| answer |\n| --- |\n| a\\|b<br>c |"
