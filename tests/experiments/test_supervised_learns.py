"""Protects that SFT, reward modelling, DPO and IPO learn a task that can be computed, with one
curve in one process and under other layouts."""

from __future__ import annotations

import pytest
import torch

from executor.dataset import Item
from profiles.models import ModelSpec
from tests.runs import Runs, make_plan, run_plans

MODEL = ModelSpec(
    name="learner", num_layers=2, hidden=32, num_heads=2, num_kv_heads=2, head_dim=16, ffn=64,
    vocab=32, max_positions=64,
)  # fmt: skip
STEPS = 20
OVERRIDES = ["batch_size=16", "prompt_len=4", "response_len=6", f"total_steps={STEPS}",
             "init=random"]  # fmt: skip


class Task:
    """An answer counts on from its prompt's last token; of a pair the chosen one has even tokens,
    the rejected one odd ones.

    Answers have unequal lengths, so that an average over micro-batches is not one over tokens.
    """

    num_prompts = None

    def __init__(self, num_answers: int) -> None:
        self.num_answers = num_answers

    def batch(self, step: int, batch_size: int) -> list[Item]:
        rng = torch.Generator().manual_seed(step)

        def whole(low: int, high: int, count: int = 1) -> torch.Tensor:
            return torch.randint(low, high, (count,), generator=rng)

        items = []
        for i in range(batch_size):
            prompt = whole(0, 32, int(whole(2, 5)))
            answers = tuple(
                2 * whole(0, 16, int(whole(1, 7))) + odd for odd in range(self.num_answers)
            )
            if self.num_answers == 1:
                answers = ((prompt[-1] + torch.arange(1, 1 + len(answers[0]))) % 32,)
            items.append(Item(record={"id": f"{step}-{i}"}, prompt=prompt, answers=answers))
        return items


TASKS = {
    "sft": (Task(1), "actor_train", "loss", ["actor.lr=2e-2"]),
    "reward": (Task(2), "reward_train", "accuracy", ["reward.lr=3e-3"]),
    "dpo": (Task(2), "actor_train", "accuracy", ["actor.lr=3e-3", "dpo.beta=0.5"]),
    "dpo ipo": (Task(2), "actor_train", "accuracy", ["actor.lr=3e-3", "dpo.loss=ipo"]),
}
WHOLE = (1, "0:d1p1m1:1")
LAYOUTS = {"moved": (2, "0:d2p1m1:3"), "piped": (2, "0:d1p2m1:4"), "split": (2, "0:d1p1m2:2")}
# Every layout for one algorithm; for the others the one that cuts a pair's batch.
COMPARED = {name: ("moved",) if name != "sft" else tuple(LAYOUTS) for name in TASKS}
Curve = dict[str, list[float]]


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    """The task's metrics by step, by "task layout"."""
    layouts = {"whole": WHOLE, **LAYOUTS}
    runs: Runs = {}
    for name, (data, _, _, options) in TASKS.items():
        for title in ("whole", *COMPARED[name]):
            plan = make_plan(
                *layouts[title], algorithm=name.split()[0], overrides=[*OVERRIDES, *options],
                spec=MODEL,
            )  # fmt: skip
            runs[f"{name} {title}"] = plan, data
    found = run_plans(runs, tmp_path_factory.mktemp("runs"))

    def curve(run: str) -> Curve:
        _, call, metric, _ = TASKS[run.rpartition(" ")[0]]
        metrics = [found[run][0].metrics[f"{step}/{call}"] for step in range(STEPS)]
        return {key: [values[key] for values in metrics] for key in ("loss", metric, "grad_norm")}

    return {run: curve(run) for run in runs}


@pytest.mark.parametrize("name", TASKS)
def test_it_learns_with_one_curve_under_every_plan(name: str, curves: dict[str, Curve]) -> None:
    whole, metric = curves[f"{name} whole"], TASKS[name][2]
    start, end = whole[metric][0], sum(whole[metric][-3:]) / 3
    if metric == "loss":
        assert start > 3.0  # at random log 32 = 3.47
        assert end < 1.0, whole
    else:
        assert end > 0.85, whole
    for title in COMPARED[name]:
        other = curves[f"{name} {title}"]
        for key in ("loss", "grad_norm"):
            # Rounding differs between layouts and grows with the steps.
            assert other[key][:5] == pytest.approx(whole[key][:5], rel=1e-3, abs=1e-4), title
        tolerance = {"rel": 0.1, "abs": 0.03}
        assert other["loss"][-1] == pytest.approx(whole["loss"][-1], **tolerance), title
