"""Losses and gradients of TRL's trainers on random tensors, for tests/experiments/test_trl.py.

    python scripts/compare_trl.py [-o tests/experiments/trl_reference.json]

Run it in an environment of its own with `trl` installed (pip install trl==1.16.0 torch); nothing
of realplan is imported. It calls the loss functions of DPOTrainer, GRPOTrainer and RewardTrainer
themselves, with a model that says what we want it to say, and writes what went in, what came out
and which versions said so. TRL 1.16 has no PPO trainer; its clipped loss with one advantage a
token is the one that GRPOTrainer computes for advantages of that shape.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.reward_trainer import RewardTrainer

LENGTHS = (3, 6, 1, 4)  # tokens of each answer; every prompt is one token
LONGEST = max(LENGTHS)
# Options of a GRPOTrainer, or of a DPOTrainer, by the name of the case.
GRPO: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "beta": 0.04},
    "token": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "two-sided": {"loss_type": "bnpo", "delta": 1.5},
    "entropy": {"loss_type": "bnpo", "entropy_coef": 0.1},
    "ppo": {"loss_type": "bnpo", "per_token": True},
}
DPO = {"sigmoid": {"beta": 0.3}, "ipo": {"beta": 0.7}}


class Everything:
    """An accelerator of one process."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = True

    def gather(self, value: Tensor) -> Tensor:
        return value

    gather_for_metrics = gather

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        return value


def words(logits: Tensor, mask: Tensor) -> SimpleNamespace:
    """What TRL's models return: the first of two words is the one that was said."""
    logs = logits.log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    return SimpleNamespace(
        log_probs=logs[..., 0] * mask, entropy=entropy, mean_logits=logits.mean(-1),
        is_top1=logits[..., 0] > logits[..., 1],
    )  # fmt: skip


def grpo_loss(options: dict[str, Any], data: dict[str, Tensor], mask: Tensor) -> Tensor:
    """GRPOTrainer's loss of ``data``."""
    said = words(data["logits"], mask)
    epsilon_high = options.get("epsilon_high", 0.2)
    trainer = SimpleNamespace(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=options.get("beta", 0.0), use_vllm=False,
        loss_type=options["loss_type"], epsilon_low=0.2, epsilon_high=epsilon_high,
        max_completion_length=LONGEST, accelerator=Everything(), use_adaptive_entropy=False,
        _entropy_bonus_enabled="entropy_coef" in options,
        entropy_coef=options.get("entropy_coef", 0.0), current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(
            delta=options.get("delta"), use_bias_correction_kl=False, steps_per_generation=1
        ),
        _get_per_token_logps_and_entropies=lambda *args, **more: (
            said.log_probs, said.entropy, None
        ),
    )  # fmt: skip
    per_token = options.get("per_token", False)
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(LENGTHS), 1, dtype=torch.int64),
        "completion_ids": torch.zeros_like(mask), "completion_mask": mask,
        "advantages": data["token_advantages" if per_token else "advantages"],
        "old_per_token_logps": data["old"], "ref_per_token_logps": data["ref"],
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss: Tensor = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss


def dpo_loss(name: str, beta: float, data: dict[str, Tensor], mask: Tensor) -> Tensor:
    """DPOTrainer's loss of two pairs; answers 0 and 1 are the chosen ones."""
    trainer = SimpleNamespace(
        aux_loss_enabled=False, accelerator=Everything(), ld_alpha=None, beta=beta,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[name],
        loss_weights=[1.0], use_weighting=False, label_smoothing=0.0, _total_train_tokens=0,
        model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)}, _tp_size=1,
    )  # fmt: skip
    ref = (data["ref"] * mask).sum(1)
    whole = torch.cat([torch.zeros(len(LENGTHS), 1, dtype=torch.int64), mask], dim=1)
    inputs = {
        "input_ids": torch.zeros_like(whole), "attention_mask": whole, "completion_mask": whole,
        "ref_chosen_logps": ref[:2], "ref_rejected_logps": ref[2:],
    }  # fmt: skip
    loss: Tensor = DPOTrainer._compute_loss(
        trainer, lambda **more: words(data["logits"], mask), inputs, return_outputs=False
    )
    return loss


def reward_loss(data: dict[str, Tensor]) -> Tensor:
    """RewardTrainer's loss of two pairs of scores, with centering."""
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=Everything(), _tp_size=1,
        args=SimpleNamespace(center_rewards_coefficient=0.01), _total_train_tokens=0,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    scores = data["logits"][:, 0, 0]
    loss: Tensor = RewardTrainer.compute_loss(
        trainer, lambda **more: SimpleNamespace(logits=scores[:, None]),
        {"attention_mask": torch.ones(4, 1)},
    )  # fmt: skip
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses of TRL's trainers on random tensors.")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("tests/experiments/trl_reference.json")
    )
    output: Path = parser.parse_args().output
    rng = torch.Generator().manual_seed(1)
    mask = (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]).long()
    logits = torch.randn(len(LENGTHS), LONGEST, 2, generator=rng).double()
    said = logits.log_softmax(-1)[..., 0]
    noise = torch.randn(3, len(LENGTHS), LONGEST, generator=rng).double()
    data = {
        "logits": logits, "old": said + 0.5 * noise[0], "ref": said + 0.5 * noise[1],
        "advantages": torch.tensor([1.2, -0.7, 0.4, -1.5]).double(), "token_advantages": noise[2],
    }  # fmt: skip
    cases: dict[str, Any] = {}

    def add(name: str, options: dict[str, Any], loss: Any) -> None:
        data["logits"] = logits.clone().requires_grad_()
        value = loss(data)
        (gradient,) = torch.autograd.grad(value, data["logits"])
        cases[name] = {"options": options, "loss": value.item(), "gradient": gradient.tolist()}

    for name, options in GRPO.items():
        add(name, options, lambda data, options=options: grpo_loss(options, data, mask))
    for name, options in DPO.items():
        beta = options["beta"]
        add(name, options, lambda data, name=name, beta=beta: dpo_loss(name, beta, data, mask))
    add("reward", {"center_coef": 0.01}, reward_loss)
    given = {name: value.detach().tolist() for name, value in data.items()}
    versions = {"trl": trl.__version__, "torch": torch.__version__}
    text = json.dumps({"versions": versions, "lengths": LENGTHS, "given": given, "cases": cases})
    output.write_text(text + "\n", encoding="utf-8")
    for name, case in cases.items():
        print(f"{name:10} {case['loss']:.6f}")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
