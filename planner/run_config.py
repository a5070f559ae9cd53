"""The options that every algorithm has: the run, its data, its models.

An algorithm's configuration is a dataclass that inherits ``RunConfig`` and has one field of type
``ModelConfig`` named after each role; the executor reads these and leaves the rest to the
algorithm. Every field has a default and can be set as ``key=value`` on the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from planner.lengths import lognormal_lengths, lognormal_sigma, summary
from profiles.errors import ConfigError

INITS = ("checkpoint", "random")
BACKENDS = ("own", "vllm")
SCHEDULES = ("constant", "linear", "cosine")
_LEAST = {
    "total_epochs": 0, "save_every": 0, "checkpoint_every": 0, "keep_checkpoints": 1,
    "eval_every": 0, "samples_every": 0, "num_samples": 1,
}  # fmt: skip


@dataclass
class ModelConfig:
    """A role's weights and, where it is trained, its optimizer."""

    path: str = ""  # Hugging Face folder; empty: as the plan says
    init: str = ""  # checkpoint, or random (benchmarks); empty: as the run's init
    lr: float = 1e-5  # peak learning rate
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-5
    warmup_steps: int = 0  # optimizer steps of linear warm-up
    schedule: str = "constant"  # constant, linear or cosine decay over all optimizer steps
    max_grad_norm: float = 1.0  # clipping by the norm over all parameters; 0: off


@dataclass
class DataConfig:
    """A set of prompts, answers or pairs."""

    path: str = ""  # a JSONL file, or a folder that the package datasets has saved
    chat_template: bool = True  # wrap prompts in the tokenizer's chat template, if it has one


@dataclass
class StepDataConfig(DataConfig):
    """The data of the steps; and for estimates, how long prompts and answers are, in tokens.

    Prompts by their mean. Answers lognormal by mean and 95th percentile (or sigma), or a list of
    lengths that were seen. What nothing is said of counts as long as it may be.
    """

    prompt_mean: float = 0.0  # 0: as long as the longest, prompt_len
    response_mean: float = 0.0  # before the longest are cut off; 0: no lognormal
    response_p95: float = 0.0  # 95th percentile
    response_sigma: float = 0.0  # standard deviation of the logarithm, in place of response_p95
    response_lengths: list[int] = field(default_factory=list)

    def mean_prompt(self, longest: int) -> float | None:
        """For ``Workload.mean_prompt_tokens``; None where nothing is said of it.

        Raises:
            ConfigError: not from 1 to ``longest``.
        """
        self._check_not_negative("prompt_mean")
        if self.prompt_mean == 0:
            return None
        self._check_mean("prompt", longest)
        return self.prompt_mean

    def answer_lengths(self, longest: int) -> tuple[int, ...]:
        """For ``Workload.response_lengths``; () where nothing is said of lengths.

        Raises:
            ConfigError: names the field that cannot be, or of which there is one too many.
        """
        if self.response_lengths:
            return self._seen(longest)
        mean, p95, sigma = self.response_mean, self.response_p95, self.response_sigma
        for name in ("response_mean", "response_p95", "response_sigma"):
            self._check_not_negative(name)
        if mean == 0:
            if p95 or sigma:
                raise ConfigError("a distribution needs its mean", where="data.response_mean")
            return ()
        self._check_mean("response", longest)
        if bool(p95) == bool(sigma):
            raise ConfigError(
                "a lognormal distribution needs its 95th percentile or its sigma, not both",
                where="data.response_p95",
            )
        return lognormal_lengths(mean, sigma or lognormal_sigma(mean, p95), longest)

    def _check_not_negative(self, name: str) -> None:
        value = getattr(self, name)
        if not 0 <= value < math.inf:
            problem = f"{value} is below 0" if value < 0 else f"{value} is no number of tokens"
            raise ConfigError(problem, where=f"data.{name}")

    def _check_mean(self, what: Literal["prompt", "response"], longest: int) -> None:
        mean = getattr(self, f"{what}_mean")
        if not 1 <= mean <= longest:
            noun = "prompt" if what == "prompt" else "answer"
            raise ConfigError(
                f"{mean:g} is not from 1 to the longest {noun}, {longest}",
                where=f"data.{what}_mean", remedy=f"lower it or raise {what}_len",
            )  # fmt: skip

    def _seen(self, longest: int) -> tuple[int, ...]:
        if self.response_mean or self.response_p95 or self.response_sigma:
            raise ConfigError(
                "lengths that were seen and a distribution of lengths",
                where="data.response_lengths", remedy="give one of them",
            )  # fmt: skip
        wrong = [n for n in self.response_lengths if not 1 <= n <= longest]
        if wrong:
            raise ConfigError(
                f"{wrong[0]} is not from 1 to the longest answer, {longest}",
                where="data.response_lengths", remedy="drop it or raise response_len",
            )  # fmt: skip
        return summary(self.response_lengths)


@dataclass
class RunConfig:
    """One run of an algorithm."""

    batch_size: int = 512  # prompts (pairs, examples) per step
    prompt_len: int = 1024  # longest prompt, in tokens; longer ones are refused
    response_len: int = 1024  # longest answer, in tokens
    total_steps: int = 10
    total_epochs: int = 0  # passes over the data, instead of total_steps; 0: as total_steps says
    seed: int = 1
    init: str = "checkpoint"  # checkpoint, or random: weights without a file (benchmarks)
    save_every: int = 0  # steps between saved models; 0: after the last step only
    checkpoint_every: int = 0  # steps between checkpoints to go on from; 0: none
    keep_checkpoints: int = 2  # older ones are removed
    eval_every: int = 0  # steps between evaluations on eval_data; 0: none
    samples_every: int = 0  # steps between tables of answers with their rewards; 0: none
    num_samples: int = 4  # most answers in such a table
    wandb_project: str = ""  # Weights & Biases gets the numbers too, if it is installed; empty: not
    resume: str = ""  # a checkpoint's folder, or auto: the newest in output, if there is one
    # Who generates: own, or vllm (pip install 'realplan[vllm]'), whose sampled tokens are others
    # and depend on the plan; greedy ones are the same. A plan is priced for our own.
    generation_backend: str = "own"
    hang_timeout_s: float = 1800.0  # an instruction that takes longer is reported as a hang
    output: str = "runs/latest"  # folder for metrics, traces and saved models
    data: StepDataConfig = field(default_factory=StepDataConfig)
    eval_data: DataConfig = field(default_factory=DataConfig)

    def check_run(self) -> None:
        """Raise ``ConfigError`` naming the first value out of range."""
        for name in ("batch_size", "prompt_len", "response_len", "total_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{getattr(self, name)} is not at least 1", where=name)
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{getattr(self, name)} is below {least}", where=name)
        if self.eval_every and not self.eval_data.path:
            raise ConfigError(
                "there is nothing to evaluate on", where="eval_every",
                remedy="give eval_data.path=FILE",
            )  # fmt: skip
        if not 0 < self.hang_timeout_s < math.inf:
            raise ConfigError(f"{self.hang_timeout_s} is not above 0", where="hang_timeout_s")
        if not self.output:
            raise ConfigError("is empty", where="output", remedy="name a folder with -o")
        if self.init not in INITS:
            raise ConfigError(f"'{self.init}' is neither checkpoint nor random", where="init")
        if self.generation_backend not in BACKENDS:
            raise ConfigError(
                f"'{self.generation_backend}' is unknown", where="generation_backend",
                remedy=f"use one of {', '.join(BACKENDS)}",
            )  # fmt: skip
        for role, model in self.models().items():
            check_model(model, where=role)

    def models(self) -> dict[str, ModelConfig]:
        """The roles' configurations by name."""
        values: dict[str, Any] = vars(self)
        return {name: value for name, value in values.items() if isinstance(value, ModelConfig)}


def check_model(model: ModelConfig, *, where: str) -> None:
    """Raise ``ConfigError`` naming the first value out of range."""
    if model.init not in ("", *INITS):
        raise ConfigError(f"'{model.init}' is neither checkpoint nor random", where=f"{where}.init")
    if model.schedule not in SCHEDULES:
        raise ConfigError(
            f"'{model.schedule}' is unknown", where=f"{where}.schedule",
            remedy=f"use one of {', '.join(SCHEDULES)}",
        )  # fmt: skip
    for name in ("lr", "weight_decay", "max_grad_norm", "warmup_steps"):
        if getattr(model, name) < 0:
            raise ConfigError(f"{getattr(model, name)} is below 0", where=f"{where}.{name}")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(model, name) < 1:
            raise ConfigError(f"{getattr(model, name)} is not in [0, 1)", where=f"{where}.{name}")
    if not model.eps > 0:
        raise ConfigError(f"{model.eps} is not above 0", where=f"{where}.eps")
