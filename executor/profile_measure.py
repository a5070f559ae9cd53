"""How something is timed: in lockstep with the other workers, until it is known well enough.

Read ``Lockstep.measure`` first. Workers of one machine share its memory bandwidth and caches, so
a worker alone is faster than it will be in a run: all workers measure the same thing at the same
time, and a result is the median over workers of each worker's median. Only decode steps, which
read weights at the memory's speed, are measured by a worker alone as well: a plan may give
generation to one worker while the others rest. What is measured is
``profile_layers.py``'s and ``profile_device.py``'s.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from executor.parallel.data import gather

Action = Callable[[], object]

# A sample lasts at least this long, so that the clock, a barrier's skew (some 0.1 ms over gloo)
# and a scheduler's tick do not show in it.
MIN_SAMPLE_S = 4e-3
MIN_SAMPLES, MAX_SAMPLES = 3, 25
# Relative inter-quartile range below which a median is taken as known.
SMALL_SPREAD = 0.05
# Of the actions' seconds together, the least that a reading is.
SMALLEST_PART = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Median seconds, relative inter-quartile range, number of samples of each worker."""

    seconds: float
    spread: float
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """``actions`` are run in turn; a reading is a sum of their seconds times its weights.

    Training's backward, for one, is (forward and backward with gradients) minus (forward
    without): ``readings={"forward": (1, 0), "backward": (-1, 1)}``. Readings are divided by
    ``count``, the number of layers that one action runs.
    """

    actions: tuple[Action, ...]
    readings: dict[str, tuple[float, ...]]
    count: int = 1


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, with linear interpolation.

    >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
    (2.0, 3.0, 4.0)
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


class Lockstep:
    """This worker among the workers that measure together; ``world_size`` 1 measures alone."""

    def __init__(self, device: torch.device, *, world_size: int) -> None:
        self.device = device
        self.world_size = world_size

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1))  # CPU tensors go over gloo on every kind of device

    def maximum(self, value: float) -> float:
        """The largest ``value`` of all workers, so that all of them decide alike."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)

    def gather(self, values: Tensor) -> Tensor:
        """Every worker's ``values`` [n] -> [world_size, n], the same on all of them."""
        return torch.stack(gather(values, dist.group.WORLD if self.world_size > 1 else None))

    def elapsed_s(self, action: Action, repeats: int) -> float:
        """Seconds of one of ``repeats`` runs in a row; the device's own clock on CUDA."""
        if self.device.type == "cuda":
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(self.device)
            start.record()
            for _ in range(repeats):
                action()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / repeats
        before_s = time.perf_counter()
        for _ in range(repeats):
            action()
        return (time.perf_counter() - before_s) / repeats

    def measure(self, probe: Probe, *, cap_s: float) -> dict[str, Measurement]:
        """The readings of ``probe``, in about ``cap_s`` seconds or as little as they need.

        One warm-up; then rounds of samples, the actions in turn in each, until the relative
        inter-quartile range of all readings is small or the time is used up.
        """
        self.barrier()
        warm_s = [self.elapsed_s(action, 1) for action in probe.actions]
        samples: list[list[float]] = []  # [samples][actions]
        if self.maximum(sum(warm_s)) < cap_s / 8:
            # The first run pays for first touches of memory and, on CUDA, for loading kernels.
            warm_s = [self.elapsed_s(action, 1) for action in probe.actions]
        elif self.device.type == "cpu":
            samples.append(warm_s)  # beside so long a run the first touches are nothing
        repeats = [
            max(1, math.ceil(MIN_SAMPLE_S / max(self.maximum(seconds), 1e-7))) for seconds in warm_s
        ]
        first = len(samples)
        start_s = time.perf_counter()
        while True:
            self.barrier()
            for _ in range(MIN_SAMPLES - len(samples) % MIN_SAMPLES):
                pairs = zip(probe.actions, repeats, strict=True)
                samples.append([self.elapsed_s(action, count) for action, count in pairs])
            found = self._agree(probe, samples)
            used_s = self.maximum(time.perf_counter() - start_s)
            round_s = used_s / (len(samples) - first) * MIN_SAMPLES
            settled = len(samples) > MIN_SAMPLES and all(
                m.spread < SMALL_SPREAD for m in found.values()
            )
            if settled or used_s + round_s > cap_s or len(samples) + MIN_SAMPLES > MAX_SAMPLES:
                return found

    def _agree(self, probe: Probe, samples: Sequence[Sequence[float]]) -> dict[str, Measurement]:
        """Median over workers of each worker's median, and of each worker's spread."""
        mine: list[float] = []
        for weights in probe.readings.values():
            values = [
                sum(w * s for w, s in zip(weights, sample, strict=True)) / probe.count
                for sample in samples
            ]
            low, middle, high = quartiles(values)
            mine += [middle, (high - low) / max(abs(middle), 1e-9)]
        medians = self.gather(torch.tensor(mine, dtype=torch.float64)).quantile(0.5, dim=0).tolist()
        whole_s = max(statistics.median(sum(sample) for sample in samples) / probe.count, 1e-9)
        whole_s = self.maximum(whole_s)
        return {
            # A difference of two noisy times may fall below zero where it is next to nothing: what
            # cannot be told from noise counts as a fiftieth of the whole.
            name: Measurement(
                seconds=max(medians[2 * i], SMALLEST_PART * whole_s),
                spread=medians[2 * i + 1],
                samples=len(samples),
            )
            for i, name in enumerate(probe.readings)
        }
