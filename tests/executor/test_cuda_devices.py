"""Protects a run on a GPU from the host's tensors: none mixes into what the device computes, and a
captured turn asks for nothing, under every algorithm. A pretended GPU stands in for a real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from executor import worker as worker_module
from executor.generation import Generation
from executor.model import attention
from executor.run import Run, functions_of
from executor.text import TextCodec
from executor.trace import TraceWriter
from executor.transfer import SampleStore
from executor.weights import Weights
from executor.worker import Worker
from planner.algorithm import make_config
from planner.graph import CallKind
from planner.program import compile_plan
from tests.executor.pretended import (
    DEVICE,
    DeviceTensor,
    Gpu,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from tests.executor.test_transfer import GENERATE, GRAPH, batch_of
from tests.runs import ALGORITHMS, SMALL, make_plan, mock_data

OVERRIDES = [
    "batch_size=4", "prompt_len=6", "response_len=8", "init=random", "total_steps=1",
]  # fmt: skip
SPECS = {
    "dense": replace(SMALL, num_layers=2),
    "window": replace(SMALL, num_layers=2, sliding_window=4),
    "experts": replace(SMALL, num_layers=2, num_experts=4, experts_per_token=2),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """With flash-attn; bf16 weights, as on CUDA."""
    gpu = Gpu()
    monkeypatch.setattr(torch, "tensor", gpu.tensor)
    monkeypatch.setattr(worker_module, "Weights", _in_bf16)
    monkeypatch.setattr(Generation, "capture", lambda *arguments: gpu.capture)
    monkeypatch.setattr(attention, "_flash_attention", lambda: flash_attn_varlen_func)
    monkeypatch.setattr(attention, "_flash_decode", lambda *kind: flash_attn_with_kvcache)
    with gpu:
        yield gpu


def _in_bf16(run: Run, contexts: object, **options: object) -> Weights:
    make = partial(Weights, **{**options, "dtype": torch.bfloat16})  # type: ignore[arg-type]
    return make(run, contexts)  # type: ignore[arg-type]


CASES = [(algorithm, "dense") for algorithm in ALGORITHMS] + [
    ("grpo", "window"),
    ("sft", "experts"),
]


def one_step(algorithm: str, spec: str, device: torch.device, folder: Path) -> Worker:
    """A worker that has carried out a run's only step on ``device``, alone."""
    overrides = [*OVERRIDES, f"output={folder}"]
    plan = make_plan(1, "0:d1p1m1:1", overrides=overrides, spec=SPECS[spec], algorithm=algorithm)
    config = make_config(ALGORITHMS[algorithm].config_class, [], base=plan.problem.config)
    run = Run(plan=plan, algorithm=ALGORITHMS[algorithm], config=config)
    with TraceWriter(folder / "trace", 0) as trace:
        worker = Worker(
            run, compile_plan(plan), rank=0, device=device, functions=functions_of(run),
            data=mock_data(plan, config), text=TextCodec(None), store=dist.HashStore(), trace=trace,
        )  # fmt: skip
        worker.setup()
        worker.run_step(0, last=True)
    for trainer in worker.weights.trainers.values():
        assert trainer.optimizer.count.item() > 0
        assert trainer.stage.buffer.flat.isfinite().all()
    return worker


@pytest.mark.parametrize(("algorithm", "spec"), CASES)
def test_nothing_of_the_host_mixes_into_a_step(
    algorithm: str, spec: str, gpu: Gpu, tmp_path: Path
) -> None:
    worker = one_step(algorithm, spec, DEVICE, tmp_path)
    for trainer in worker.weights.trainers.values():
        assert isinstance(trainer.gradients, DeviceTensor)
    generates = any(call.kind is CallKind.GENERATE for call in worker.problem.graph.calls)
    assert bool(gpu.captured) == generates


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("algorithm", "spec"), CASES)
def test_a_step_runs_on_a_gpu(algorithm: str, spec: str, tmp_path: Path) -> None:
    worker = one_step(algorithm, spec, torch.device("cuda", 0), tmp_path)
    for trainer in worker.weights.trainers.values():
        assert trainer.gradients.is_cuda


def test_a_parcel_crosses_through_the_hosts_memory(gpu: Gpu) -> None:
    """Over gloo: NCCL's sends wait for their receipt, which the program does not expect."""
    here, there = (SampleStore(GRAPH, DEVICE, 1) for _ in range(2))
    here.put(batch_of([3, 5], [4, 6]), GENERATE)
    keys = [GRAPH.key(name) for name in GENERATE.outputs]
    header, payload = here.pack([5], keys)
    assert not isinstance(header, DeviceTensor)
    assert not isinstance(payload, DeviceTensor)
    there.unpack([5], header.tolist(), payload, keys)
    for key in keys:
        value = there.values[key.name][5]
        assert isinstance(value, DeviceTensor)
        assert value.tolist() == here.values[key.name][5].tolist()


def test_the_pretended_gpu_refuses_what_a_real_one_does(gpu: Gpu) -> None:
    x, host = torch.arange(4.0, device=DEVICE), torch.ones(4)
    assert (x + host.sum()).tolist() == [4.0, 5.0, 6.0, 7.0]
    for mixed in (
        lambda: x + host, lambda: torch.stack([x.sum(), host.sum()]), lambda: host[x.long()],
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="the host's"):
            mixed()
    for asks in (
        lambda: x.sum().item(), lambda: x[x > 1], x.cpu, lambda: x.copy_(host), x.tolist,
        lambda: torch.tensor([1.0], device=DEVICE),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="in a capture"):
            gpu.capture(asks)
    gpu.capture(lambda: x.add_(1))()
    assert x.tolist() == [2.0, 3.0, 4.0, 5.0]
