"""What becomes of a batch before it is trained on, and the numbers that are kept over steps for it.

Read ``Experience``: an algorithm gives it the estimate of its advantages. All ranks of a call
keep the same numbers, because they are made of sums over all of them; they go into checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from executor.batch import SequenceBatch
from executor.calls import Sum
from experiments.losses import kl_penalty, response_mask
from experiments.options import PolicyConfig

# (batch, kl_coef, sum_over_dp) -> the batch with ``advantages`` [tokens] and what the losses need.
Estimate = Callable[[SequenceBatch, float, Sum], SequenceBatch]
# The prior system's floor of a variance, 1e-2: the first steps' values may all be equal.
MIN_STD = 0.1


class RunningMoments:
    """Mean and standard deviation (over n) of all values seen in all steps, on all ranks; exact.

    A step's moments are taken in two passes and merged: Chan, Golub and LeVeque 1979, "Updating
    formulae and a pairwise algorithm for computing sample variances", equation 2.1.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0  # squares: sum of (x - mean)^2

    def update(self, values: Tensor, sum_over_dp: Sum) -> None:
        """Add the ``values`` [n] of this rank and those of the others; n may be 0."""
        wide = values.detach().double().flatten()
        own = torch.stack([wide.new_tensor(float(wide.numel())), wide.sum()])
        count, total = sum_over_dp(own).tolist()
        if count == 0:
            return
        mean = total / count
        squares = float(sum_over_dp(((wide - mean) ** 2).sum()))
        apart, together = mean - self.mean, self.count + count
        self.squares += squares + apart**2 * self.count * count / together
        self.mean += apart * count / together
        self.count = together

    @property
    def std(self) -> float:
        """At least ``MIN_STD``; 1 before anything is seen."""
        return max(MIN_STD, (self.squares / self.count) ** 0.5) if self.count else 1.0

    def normalize(self, values: Tensor) -> Tensor:
        """(x - mean) / std."""
        return (values - self.mean) / self.std

    def denormalize(self, values: Tensor) -> Tensor:
        """x std + mean."""
        return values * self.std + self.mean

    def state(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def restore(self, state: Mapping[str, float]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


class KLController:
    """The coefficient of the divergence from the reference: fixed, or moved towards a target.

    coef *= 1 + clip(KL / target - 1, +-0.2) n / horizon after n answers of mean divergence KL.
    Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.
    """

    def __init__(self, options: PolicyConfig) -> None:
        self.coef = options.kl_coef
        self.target, self.horizon = options.kl_target, options.kl_horizon

    def observe(self, batch: SequenceBatch, sum_over_dp: Sum) -> None:
        """Move by the divergence of a step's answers, log p / p_ref summed over each."""
        if not self.target:
            return
        mask = response_mask(batch)
        apart = kl_penalty(
            batch.get("log_probs")[mask], batch.get("ref_log_probs")[mask], estimator="k1"
        )
        own = torch.stack([apart.double().sum(), apart.new_tensor(batch.num_sequences).double()])
        total, count = sum_over_dp(own).tolist()
        error = min(0.2, max(-0.2, total / count / self.target - 1.0))
        self.coef *= 1.0 + error * count / self.horizon

    def state(self) -> float:
        return self.coef

    def restore(self, state: float) -> None:
        self.coef = state


class Experience:
    """Advantages of a step's batch, under the KL coefficient of this step."""

    def __init__(
        self, estimate: Estimate, options: PolicyConfig,
        moments: Mapping[str, RunningMoments] | None = None,
    ) -> None:  # fmt: skip
        self.estimate, self.options = estimate, options
        self.moments = dict(moments or {})
        self.kl = KLController(options)
        self.kl_coef = options.kl_coef  # of the step under way

    @property
    def kl_in_loss(self) -> float:
        """The coefficient of the loss's own term; 0 where rewards pay for the divergence."""
        return self.kl_coef if self.options.kl_in == "loss" else 0.0

    def prepare(self, batch: SequenceBatch, sum_over_dp: Sum) -> SequenceBatch:
        """The batch with what ``estimate`` adds; then the coefficient of the next step."""
        self.kl_coef = self.kl.coef
        in_rewards = self.kl_coef if self.options.kl_in == "reward" else 0.0
        prepared = self.estimate(batch, in_rewards, sum_over_dp)
        self.kl.observe(batch, sum_over_dp)
        return prepared

    def state(self) -> dict[str, Any]:
        moments = {name: moments.state() for name, moments in self.moments.items()}
        return {"kl_coef": self.kl.state(), "moments": moments}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.kl.restore(state["kl_coef"])
        for name, moments in self.moments.items():
            moments.restore(state["moments"][name])
