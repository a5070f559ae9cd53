"""Every option of PPO, with its default and its meaning; the defaults are the prior system's.

Shown and set as ``key=value`` behind the flags of ``realplan search`` and ``realexec run``:
``batch_size=256 ppo.kl_coef=0.05 actor.path=models/sft``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from profiles.errors import ConfigError


@dataclass
class ModelConfig:
    """A role's weights and, where it is trained, its optimizer."""

    path: str = ""  # Hugging Face folder; empty: not known yet
    init: str = "checkpoint"  # checkpoint, or random (benchmarks)
    lr: float = 1e-5  # peak learning rate
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-5
    warmup_steps: int = 0  # optimizer steps of linear warm-up
    schedule: str = "constant"  # constant, linear or cosine decay over all optimizer steps
    max_grad_norm: float = 1.0  # gradient clipping over all parameters; 0: off


@dataclass
class RewardConfig(ModelConfig):
    """Where rewards come from: a reward model, or a function of the answer's text."""

    source: str = "model"  # model; vader (sentiment); or package.module:function


@dataclass
class PPOConfig:
    """PPO's own numbers."""

    num_mini_batches: int = 4  # optimizer steps per batch
    kl_coef: float = 0.1  # beta of the per-token reward -beta * (log p - log p_ref)
    gamma: float = 1.0  # discount
    lam: float = 1.0  # lambda of GAE
    clip: float = 0.2  # policy ratio is clipped to 1 +- clip
    value_clip: float = 0.2  # new values are clipped to the old ones +- value_clip
    reward_clip: float = 20.0  # scores are clipped to +- reward_clip
    reward_scale: float = 1.0  # score = (reward - reward_bias) * reward_scale
    reward_bias: float = 0.0
    normalize_advantages: bool = True  # over all answer tokens of the batch
    score_truncated: bool = True  # false: an answer without an end token gets no score


@dataclass
class GenerationConfig:
    """Sampling of answers; answers are at most ``response_len`` tokens."""

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    greedy: bool = False
    min_new_tokens: int = 0


@dataclass
class DataConfig:
    """The prompts: JSONL with a ``prompt`` in every line."""

    path: str = ""
    chat_template: bool = True  # wrap prompts in the tokenizer's chat template, if it has one


@dataclass
class PPOExperiment:
    """PPO with four models: actor, critic, reference and reward."""

    batch_size: int = 512  # sequences per step
    prompt_len: int = 1024  # longest prompt, in tokens; longer ones are refused
    response_len: int = 1024  # longest answer, in tokens
    total_steps: int = 10
    seed: int = 1
    save_every: int = 0  # steps between saved models; 0: at the end only
    output: str = "runs/ppo"  # folder for metrics and models
    ppo: PPOConfig = field(default_factory=PPOConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    actor: ModelConfig = field(default_factory=ModelConfig)
    critic: ModelConfig = field(default_factory=ModelConfig)
    ref: ModelConfig = field(default_factory=ModelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def check(self) -> PPOExperiment:
        """Itself, or ``ConfigError`` naming the first value out of range."""
        for name in ("batch_size", "prompt_len", "response_len", "total_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{getattr(self, name)} is not at least 1", where=name)
        if not 1 <= self.ppo.num_mini_batches <= self.batch_size:
            raise ConfigError(
                f"{self.ppo.num_mini_batches} mini-batches of a batch of {self.batch_size}",
                where="ppo.num_mini_batches", remedy=f"use 1 to {self.batch_size}",
            )  # fmt: skip
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self.ppo, name) <= 1:
                raise ConfigError(f"{getattr(self.ppo, name)} is not in [0, 1]", where=f"ppo.{name}")
        for name in ("clip", "value_clip", "reward_clip"):
            if not getattr(self.ppo, name) > 0:
                raise ConfigError(f"{getattr(self.ppo, name)} is not above 0", where=f"ppo.{name}")
        for role in ("actor", "critic", "ref", "reward"):
            if getattr(self, role).init not in ("checkpoint", "random"):
                raise ConfigError(
                    f"'{getattr(self, role).init}' is neither checkpoint nor random",
                    where=f"{role}.init",
                )
        return self
