"""Protects the memory model's activations: what autograd really keeps of a block is the oracle."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from executor.model.attention import pack
from executor.model.shared import whole_or_shared
from planner.activations import copied_values, kept_bytes
from planner.strategy import ParallelStrategy, Recompute
from tests.executor.small_models import random_ids, single_stage, small_spec

NUM_SEQUENCES, LENGTH = 4, 256
SHAPE = {"hidden": 192, "num_heads": 6, "num_kv_heads": 3, "head_dim": 32, "ffn": 320}
SPECS = {
    "qwen3": small_spec(family="qwen3", qk_norm=True, **SHAPE),
    "llama": small_spec(**SHAPE),
    "gpt2": small_spec(
        family="gpt2", norm="layer", positions="learned", max_positions=LENGTH, gated=False,
        activation="gelu_tanh", **{**SHAPE, "num_kv_heads": 6},
    ),
    "mixtral": small_spec(family="mixtral", num_experts=4, experts_per_token=2, **SHAPE),
}  # fmt: skip


def kept_by_autograd(name: str, num_layers: int, recompute: Recompute, prompt: int = 0) -> int:
    """Bytes of the storages that a forward pass leaves for backward, weights not counted.

    ``prompt``: tokens that all sequences begin with.
    """
    spec = small_spec(**{**_fields(name), "num_layers": num_layers})
    stage = single_stage(spec, train=True, recompute=recompute)
    weights = stage.buffer.flat.untyped_storage().data_ptr()
    seen: dict[int, torch.UntypedStorage] = {}

    def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    ids = random_ids(spec, lengths=[LENGTH] * NUM_SEQUENCES)
    if prompt:
        rows = ids.view(NUM_SEQUENCES, LENGTH)
        rows[:, :prompt] = rows[0, :prompt]
    computed = whole_or_shared(ids, [LENGTH] * NUM_SEQUENCES)
    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        stage.forward(computed.select(ids), computed.packed)
    return sum(s.nbytes() for address, s in seen.items() if address != weights)


def _fields(name: str) -> dict[str, object]:
    return {field: getattr(SPECS[name], field) for field in SPECS[name].__slots__}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", SPECS)
def test_a_block_keeps_what_the_memory_model_says(name: str, recompute: Recompute) -> None:
    # Two blocks more: the ends of the model do not count.
    found = kept_by_autograd(name, 4, recompute) - kept_by_autograd(name, 2, recompute)
    per_token = found / 2 / (NUM_SEQUENCES * LENGTH)
    expected = kept_bytes(
        SPECS[name], ParallelStrategy(recompute=recompute), value_bytes=4, length=LENGTH
    )
    # Statistics of norms and of attention, indices of experts: a few values a token.
    assert expected <= per_token <= expected * 1.02


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("name", SPECS)
def test_what_sharing_keeps_besides(name: str, recompute: Recompute) -> None:
    """Keys and values of whole sequences, and attention's output in its order."""
    prompt = 160
    found = kept_by_autograd(name, 4, recompute, prompt) - kept_by_autograd(
        name, 2, recompute, prompt
    )
    computed = prompt + NUM_SEQUENCES * (LENGTH - prompt)
    block = kept_bytes(
        SPECS[name], ParallelStrategy(recompute=recompute), value_bytes=4, length=LENGTH
    )
    copied = copied_values(
        SPECS[name], 1, computed=computed, whole=NUM_SEQUENCES * LENGTH, kept=True
    )
    expected = computed * block + 4 * copied
    # Besides statistics and indices, what a block's answers see of their sequences, on CPUs.
    masks = 4 * (LENGTH - prompt) * LENGTH
    assert expected <= found / 2 <= expected * 1.02 + masks, (found / 2, expected)


class Products(TorchDispatchMode):
    """Counts matrix products, of either library."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        aten = torch.ops.aten
        products = [aten.mm.default, aten.addmm.default, aten.addmm_.default]
        if torch.backends.mkldnn.is_available():
            products.append(torch.ops.mkldnn._linear_pointwise.default)
        self.count += func in products
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("recompute", "again"), [("none", 0), ("selective", 0), ("full", 3)])
def test_recomputation_stops_before_a_blocks_last_product(recompute: Recompute, again: int) -> None:
    """qkv, o, up and down, each twice in backward; of what runs again down is not needed."""
    spec = SPECS["llama"]
    stage = single_stage(spec, train=True, recompute=recompute)
    hidden = stage.forward(random_ids(spec, lengths=[8, 8]), pack([8, 8]))
    with Products() as products:
        hidden.sum().backward()
    assert products.count == spec.num_layers * (2 * 4 + again)
