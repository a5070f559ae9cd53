"""Protects the roofline: within 35% of measured GPU layers, and the laws that any cost obeys."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.catalogue import MODELS
from profiles.clusters import make_cluster
from profiles.collectives import Collectives
from profiles.costs import Component, Operation
from profiles.devices import DEVICES
from profiles.hardware import DeviceSpec
from profiles.models import ModelSpec
from profiles.roofline import GRAPH_KERNEL_S, RooflineCosts, block_products

# Milliseconds at tp 1, 2, 4, 8, with collectives, from the kernels that NVIDIA's aiconfigurator
# publishes: forward of one block, one sequence of 2048 tokens.
FORWARD_MS = {
    ("a100", "llama-7b"): (3.8, 2.3, 1.5, 1.1),
    ("a100", "llama-70b"): (14.2, 7.7, 4.4, 2.9),
    ("h100", "llama-7b"): (1.33, 0.89, 0.61, 0.51),
    ("h100", "llama-70b"): (5.0, 2.9, 1.7, 1.2),
}
# One decode step of one block: 64 sequences, context 1024.
DECODE_MS = {
    ("a100", "llama-7b"): (0.94, 0.54, 0.31, 0.22),
    ("a100", "llama-70b"): (1.29, 0.72, 0.44, 0.30),
    ("h100", "llama-7b"): (0.54, 0.30, 0.18, 0.13),
}


def _block_ms(device: str, model: str, operation: Operation, tp: int, size: int) -> float:
    spec = MODELS[model]
    compute = RooflineCosts(DEVICES[device])
    length = 2048 if operation == "forward" else 1024
    seconds = compute.layer(spec, "block", operation, tp=tp, size=size, length=length).seconds
    num_bytes = size * spec.hidden * 2
    sums = Collectives(make_cluster(device, 8)).all_reduce(num_bytes, range(tp))
    return 1e3 * (seconds + 2 * sums.seconds)


@pytest.mark.parametrize("device, model", FORWARD_MS)
def test_forward_is_near_published_measurements(device: str, model: str) -> None:
    for tp, measured in zip((1, 2, 4, 8), FORWARD_MS[(device, model)], strict=True):
        assert _block_ms(device, model, "forward", tp, 2048) == pytest.approx(measured, rel=0.35)


@pytest.mark.parametrize("device, model", DECODE_MS)
def test_decode_is_near_published_measurements(device: str, model: str) -> None:
    for tp, measured in zip((1, 2, 4, 8), DECODE_MS[(device, model)], strict=True):
        assert _block_ms(device, model, "decode", tp, 64) == pytest.approx(measured, rel=0.35)


def test_a_large_block_costs_its_flops() -> None:
    """Hand count at infinite memory rate and no launch: 2 FLOPs a weight and token, and the

    causal half of 4 * heads * head_dim * length a token; backward 2 and 2.5 times as many.
    """
    device = replace(DEVICES["a100"], memory_bytes_per_s=1e30, launch_s=0.0)
    costs = RooflineCosts(device, matmul_efficiency=1.0, attention_efficiency=1.0)
    spec, tokens = MODELS["llama-7b"], 4096
    weights = spec.attention_parameters + spec.ffn_parameters
    matmul, attention = 2.0 * weights * tokens, 2.0 * 4096 * 2048 * tokens
    forward = costs.layer(spec, "block", "forward", tp=1, size=tokens, length=2048).seconds
    backward = costs.layer(spec, "block", "backward", tp=1, size=tokens, length=2048).seconds
    assert forward == pytest.approx((matmul + attention) / 312e12)
    assert backward == pytest.approx((2 * matmul + 2.5 * attention) / 312e12)


def test_decode_of_one_sequence_costs_its_weights_and_context() -> None:
    device = replace(DEVICES["a100"], launch_s=0.0)
    costs = RooflineCosts(device, memory_efficiency=1.0)
    spec, context = MODELS["llama-7b"], 10**6
    weights = spec.attention_parameters + spec.ffn_parameters
    kv_bytes = spec.kv_bytes_per_token() / spec.num_layers * context
    found = costs.layer(spec, "block", "decode", tp=1, size=1, length=context).seconds
    assert found == pytest.approx((2 * weights + kv_bytes) / 2039e9, rel=1e-3)


def test_no_kernel_is_faster_than_its_launch() -> None:
    """In a graph than the shortest there; a CPU has none, and experts' steps are none."""
    device, tiny = DEVICES["h100"], MODELS["tiny"]
    experts = replace(tiny, family="mixtral", num_experts=4, experts_per_token=2)
    cases: list[tuple[DeviceSpec, ModelSpec, Operation, float]] = [
        (device, tiny, "forward", 12 * device.launch_s),
        (device, tiny, "decode", 12 * GRAPH_KERNEL_S),
        (device, experts, "decode", 16 * device.launch_s),
        (replace(device, kind="cpu"), tiny, "decode", 12 * device.launch_s),
        (replace(device, launch_s=1e-6), tiny, "decode", 12e-6),
    ]
    for of, spec, operation, seconds in cases:
        found = RooflineCosts(of).layer(spec, "block", operation, tp=1, size=1, length=1)
        assert found.seconds == pytest.approx(seconds), (of, spec, operation)


def test_the_optimizer_moves_its_states() -> None:
    # fp32 gradient 3 times, moments and master read and written, bf16 weight written: 38 bytes.
    costs = RooflineCosts(DEVICES["a100"], memory_efficiency=1.0)
    assert costs.optimizer_step(10**9).seconds == pytest.approx(38e9 / 2039e9)


def test_the_head_passes_three_times_over_fp32_logits() -> None:
    device = replace(DEVICES["a100"], peak_flops=1e30, launch_s=0.0)
    costs = RooflineCosts(device, memory_efficiency=1.0)
    spec, rows = MODELS["llama-7b"], 100
    norm = 2 * 2 * 4096 * rows
    product = 2 * (4096 * rows + 4096 * 32000 + 32000 * rows)
    passes = 3 * 4 * 32000 * rows

    def num_bytes(operation: Operation) -> float:
        cost = costs.layer(spec, "head", operation, tp=1, size=rows, length=rows)
        return cost.seconds * 2039e9

    choosing = 8 * 4 * 32000 * rows
    assert num_bytes("decode") == pytest.approx(norm + product + choosing)
    assert num_bytes("forward") == pytest.approx(norm + product + passes)
    # The weight's gradient in bf16 is read, its fp32 sum read and written.
    summed = (2 + 4 + 4) * 4096 * 32000
    assert num_bytes("backward") == pytest.approx(2 * (norm + product) + passes + summed)


components = st.sampled_from(["block", "embedding", "head"])
operations = st.sampled_from(["forward", "backward", "decode"])
models = st.sampled_from(["tiny", "llama-7b", "llama-70b", "qwen2.5-1.5b"])
devices = st.sampled_from(sorted(DEVICES))
factors = st.floats(1.0, 100.0)


def _seconds(
    device: DeviceSpec, model: str, component: Component, operation: Operation, **question: int
) -> float:
    costs = RooflineCosts(device)
    return costs.layer(MODELS[model], component, operation, **question).seconds  # type: ignore[arg-type]


@given(devices, models, components, operations, factors, factors, st.integers(1, 10**5))
def test_a_faster_device_is_never_slower(
    device: str, model: str, component: Component, operation: Operation, flops: float,
    rate: float, size: int,
) -> None:  # fmt: skip
    slow = DEVICES[device]
    fast = replace(
        slow,
        peak_flops=slow.peak_flops * flops,
        memory_bytes_per_s=slow.memory_bytes_per_s * rate,
    )
    question = {"tp": 1, "size": size, "length": 512}
    assert _seconds(fast, model, component, operation, **question) <= _seconds(
        slow, model, component, operation, **question
    )


@given(devices, models, components, operations, st.integers(1, 10**5), st.integers(1, 10**5))
def test_more_tokens_are_never_faster(
    device: str, model: str, component: Component, operation: Operation, a: int, b: int
) -> None:
    def seconds(size: int) -> float:
        return _seconds(DEVICES[device], model, component, operation, tp=1, size=size, length=512)

    assert seconds(min(a, b)) <= seconds(max(a, b))


@given(devices, components, operations, st.integers(1, 10**5))
def test_more_shards_are_never_slower(
    device: str, component: Component, operation: Operation, size: int
) -> None:
    by_tp = [
        _seconds(DEVICES[device], "llama-70b", component, operation, tp=tp, size=size, length=512)
        for tp in (1, 2, 4, 8)
    ]
    assert by_tp == sorted(by_tp, reverse=True)


@pytest.mark.parametrize(
    "name", ["llama-7b", "gpt2-xl", "gemma-2b", "mixtral-8x7b", "qwen1.5-moe-a2.7b"]
)
def test_a_token_is_multiplied_with_the_matrices_that_it_passes_through(name: str) -> None:
    """2 FLOPs for each active weight of a block; with experts each read once if it has a token."""
    spec = MODELS[name]
    ends = spec.embedding_parameters + spec.position_parameters + spec.head_parameters
    active = (spec.active_parameters - ends) / spec.num_layers
    for size in (1, 7, 4096):
        products = block_products(spec, 1, size)
        weights = sum(p.groups * p.rows * p.inner * p.columns for p in products) / size
        assert weights == pytest.approx(active, rel=2e-3)  # norms and biases are no products
    read = sum(p.groups * p.inner * p.columns for p in block_products(spec, 1, 4096))
    assert read == pytest.approx(spec.block_parameters, rel=2e-3)
    read = sum(p.groups * p.inner * p.columns for p in block_products(spec, 1, 1))
    assert read == pytest.approx(active, rel=2e-3)
