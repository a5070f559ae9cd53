"""``RooflineCosts``: seconds of a layer from peak rates, where nothing was measured.

A kernel takes max(FLOPs / sustained FLOP rate, bytes / sustained memory rate, launch): the host
queues kernels while the device works, so a launch shows only where it is the longest of the
three. A layer is the sum of its kernels. Decode steps that are CUDA graphs, as the engine runs them
where ``ModelSpec.decode_is_static``, are started as one: there no kernel takes less than
``GRAPH_KERNEL_S``.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, replace
from typing import Literal

from profiles.costs import Component, Cost, Operation, Provenance
from profiles.hardware import DeviceSpec
from profiles.models import ModelSpec

# Bytes of one value of weights and activations, by device kind (bf16, fp32).
VALUE_BYTES = {"cuda": 2, "cpu": 4}

# The shortest kernel of a graph, with the step to the next: of NVIDIA's aiconfigurator the smallest
# bf16 products, which read next to nothing, take 1.7 (B200, L40S) to 2.5 us (A100, H100, H200).
GRAPH_KERNEL_S = 2.5e-6


class RooflineCosts:
    """``LayerCosts`` of ``device``.

    ``matmul_efficiency``: share of the peak that matrix products sustain in a run. NVIDIA's
    aiconfigurator measures [4096, 8192] x [8192, 8192] in bf16 alone at 0.80 to 0.89 of the peak
    on an A100 and 0.79 to 0.83 on an H100; in a run, hot and one after another, products are
    about a tenth slower: 0.75.

    ``attention_efficiency``: of the fused attention kernel. FlashAttention-2 reaches 0.50 to 0.73
    on an A100 (Dao 2023) and 0.35 on an H100 (Shah et al. 2024): 0.5.

    ``memory_efficiency``: share of the memory's peak rate that kernels reach. 0.8, as
    aiconfigurator found on A100 and H100 (``mem_bw_empirical_scaling_factor``).

    Choosing tokens is counted as the longer of ``sampling_passes`` fp32 passes over the logits
    [sequences, vocab] (temperature, largest, exponentials, sum, filter, cumulative sum, search,
    log-probability, one read or write each) and ``sampling_launches`` operations, most of them
    on one value a sequence: the hash that makes the noise.

    ``attention``: ``fused`` keeps no scores; ``eager`` is systems without such a kernel: every
    score is written and read, with ``dropout`` once more behind a mask of a byte each.
    """

    def __init__(
        self,
        device: DeviceSpec,
        *,
        matmul_efficiency: float = 0.75,
        attention_efficiency: float = 0.5,
        memory_efficiency: float = 0.8,
        sampling_passes: float = 8.0,
        sampling_launches: int = 40,
        attention: Literal["fused", "eager"] = "fused",
        dropout: bool = False,
    ) -> None:
        self.device = device
        self.eager = attention == "eager"
        self.dropout = dropout
        self.matmul_flops_per_s = device.peak_flops * matmul_efficiency
        self.attention_flops_per_s = device.peak_flops * attention_efficiency
        self.memory_bytes_per_s = device.memory_bytes_per_s * memory_efficiency
        self.value_bytes = VALUE_BYTES[device.kind]
        self.sampling_passes = sampling_passes
        self.sampling_launches = sampling_launches
        self.source = f"peak rates of {device.name}"
        self._answers: dict[tuple[object, ...], Cost] = {}
        self.in_graph: RooflineCosts | None = None  # the same of kernels in a CUDA graph
        if device.kind == "cuda" and device.launch_s > GRAPH_KERNEL_S:
            self.in_graph = copy(self)
            self.in_graph.device = replace(device, launch_s=GRAPH_KERNEL_S)
            self.in_graph._answers = {}

    def modelled(self, seconds: float) -> Cost:
        """``seconds`` of a formula on the device's rates."""
        return Cost(seconds, Provenance.ROOFLINE, source=self.source)

    # ---- kernels ------------------------------------------------------------------------------

    def matmul_s(
        self, rows: float, inner: int, columns: int, *, groups: float = 1.0, value_bytes: int = 0
    ) -> float:
        """[rows, inner] x [inner, columns]: 2 * rows * inner * columns FLOPs, each matrix once.

        ``groups``: so many of them in one kernel, each with rows and a matrix of its own.
        """
        num_bytes = (
            (value_bytes or self.value_bytes)
            * groups
            * (rows * inner + inner * columns + rows * columns)
        )
        return max(
            2.0 * groups * rows * inner * columns / self.matmul_flops_per_s,
            num_bytes / self.memory_bytes_per_s,
            self.device.launch_s,
        )

    def stream_s(self, num_bytes: float) -> float:
        """An elementwise kernel that reads and writes ``num_bytes`` in all."""
        return max(num_bytes / self.memory_bytes_per_s, self.device.launch_s)

    def attention_s(self, flops: float, num_bytes: float) -> float:
        return max(
            flops / self.attention_flops_per_s,
            num_bytes / self.memory_bytes_per_s,
            self.device.launch_s,
        )

    # ---- layers -------------------------------------------------------------------------------

    def layer(
        self, spec: ModelSpec, component: Component, operation: Operation, *, tp: int, size: int,
        length: int,
    ) -> Cost:  # fmt: skip
        """See ``costs.LayerCosts``. Provenance is always ROOFLINE."""
        if operation == "decode_alone":
            operation = "decode"
        if operation == "decode" and spec.decode_is_static and self.in_graph is not None:
            return self.in_graph.layer(spec, component, operation, tp=tp, size=size, length=length)
        question = (spec, component, operation, tp, size, length)
        answer = self._answers.get(question)
        if answer is None:
            if component == "block":
                seconds = self._block_s(spec, operation, tp, size, length)
            elif component == "embedding":
                seconds = self._embedding_s(spec, operation, size)
            else:
                seconds = self.head_s(spec, operation, tp, size)
            answer = self._answers[question] = self.modelled(seconds)
        return answer

    def _block_s(
        self, spec: ModelSpec, operation: Operation, tp: int, size: int, length: int
    ) -> float:
        passes = 2 if operation == "backward" else 1
        products = block_products(spec, tp, size)
        matmul_s = sum(
            self.matmul_s(product.rows, product.inner, product.columns, groups=product.groups)
            for product in products
        )
        # backward: the gradient of the input and of the weight, one product each.
        seconds = passes * (matmul_s + self.elementwise_s(spec, tp, size))
        if operation == "backward":
            seconds += self.accumulate_s(products)
        return seconds + self.self_attention_s(spec, operation, tp, size, length)

    def experts_s(
        self, spec: ModelSpec, operation: Operation, tp: int, size: int, ep: int = 1
    ) -> float:
        """The part of a block that splitting experts over ``ep`` ranks changes: their products."""
        products = expert_products(spec, tp, size, ep)
        matmul_s = sum(self.matmul_s(p.rows, p.inner, p.columns, groups=p.groups) for p in products)
        if operation == "backward":
            return 2 * matmul_s + self.accumulate_s(products)
        return matmul_s

    def accumulate_s(self, products: Iterable[MatrixProduct]) -> float:
        """Adding a micro-batch's gradients of the products' weights to the fp32 sums.

        Each is read, the sum read and written: 2 + 4 + 4 bytes in bf16, 4 + 4 + 4 in fp32.
        """
        values = sum(product.inner * product.columns * product.groups for product in products)
        return self.stream_s((self.value_bytes + 8.0) * values)

    def self_attention_s(
        self, spec: ModelSpec, operation: Operation, tp: int, size: int, length: int
    ) -> float:
        """Causal attention of ``size`` tokens, or of ``size`` sequences' one new token.

        Scores and their product with v: 4 * heads * head_dim FLOPs for each pair of positions,
        length / 2 pairs for each token when causal; backward 2.5 times as many (five products
        instead of two). Source: Dao 2023, FlashAttention-2, section 4.1.
        """
        width, kv_width = spec.num_heads // tp * spec.head_dim, (
            2 * spec.cached_kv_heads(tp) * spec.head_dim
        )  # fmt: skip
        if operation == "decode":
            flops = 4.0 * width * length * size
            return self.attention_s(flops, self.value_bytes * kv_width * float(length) * size)
        if self.eager:
            return self._eager_attention_s(spec, operation, tp, size / length, length)
        flops = 2.0 * width * length * size
        num_bytes = self.value_bytes * (2 * width + kv_width) * float(size)
        factor = 2.5 if operation == "backward" else 1.0
        return self.attention_s(factor * flops, factor * num_bytes)

    def _eager_attention_s(
        self, spec: ModelSpec, operation: Operation, tp: int, num_sequences: float, length: int
    ) -> float:
        """Scores of all pairs of positions, the masked ones too, as matrices in memory.

        Forward: two products; softmax reads and writes the scores, dropout reads and writes them
        and writes its mask. Backward: four products; dropout as before with the mask read, and
        softmax reads two and writes one. Source: Korthikanti et al. 2022, figure 3.
        """
        heads = num_sequences * (spec.num_heads // tp)
        scores = self.matmul_s(length, spec.head_dim, length, groups=heads)
        mixed = self.matmul_s(length, length, spec.head_dim, groups=heads)
        backward = operation == "backward"
        softmax_bytes = self.value_bytes * (3 if backward else 2)
        dropout_bytes = 2 * self.value_bytes + 1 if self.dropout else 0
        passes_s = self.stream_s((softmax_bytes + dropout_bytes) * heads * float(length) ** 2)
        return (2 if backward else 1) * (scores + mixed) + passes_s

    def between_s(self, spec: ModelSpec, rows: float) -> float:
        """A block's two norms and two residual sums on ``rows``: 2 * 2 hidden and 2 * 3 hidden.

        A part of ``elementwise_s``: what sequence parallelism splits over tp.
        """
        values = 2 * [2 * spec.hidden] + 2 * [3 * spec.hidden]
        return sum(self.stream_s(self.value_bytes * v * rows) for v in values)

    def last_product_share(self, spec: ModelSpec, tp: int, size: int, length: int) -> float:
        """Of a dense block's forward pass, the share of the product that ends it."""
        last = block_products(spec, tp, size)[-1]
        whole_s = self.layer(spec, "block", "forward", tp=tp, size=size, length=length).seconds
        return self.matmul_s(last.rows, last.inner, last.columns) / whole_s

    def selective_s(self, spec: ModelSpec, tp: int, size: int, length: int, rows: float) -> float:
        """What selective recomputation does again in one block.

        Eager: attention without its projections (Korthikanti et al. 2022, section 5). Fused,
        where no scores are kept: the inputs of products, which are the norms of ``rows`` and the
        activation with its gate; experts keep theirs.
        """
        if self.eager:
            return self._eager_attention_s(spec, "forward", tp, size / length, length)
        norms = (1 if spec.num_experts else 2) * self.stream_s(
            self.value_bytes * 2 * spec.hidden * rows
        )
        if spec.num_experts:
            return norms
        passes = [2, 3] if spec.gated else [2]
        width = float(self.value_bytes * spec.ffn // tp)
        return norms + sum(self.stream_s(values * width * size) for values in passes)

    def elementwise_s(self, spec: ModelSpec, tp: int, size: int) -> float:
        """Two norms, two residual sums, rotary embedding, silu and its product, as eager kernels.

        Values read and written for each token: norms 2 * 2 hidden, sums 2 * 3 hidden, rotary
        4 (q + k), silu 2 ffn, product with the gate 3 ffn. Experts: a token's row goes to each of
        its experts and back, 2 * 2 k hidden, and the k answers are weighted and summed, 3 k hidden.
        """
        qk = (spec.num_heads // tp + spec.cached_kv_heads(tp)) * spec.head_dim
        ffn = spec.active_ffn // tp
        values = [2 * ffn]
        values += [4 * qk] if spec.positions == "rope" else []
        values += [3 * ffn] if spec.gated else []
        rows = spec.experts_per_token * spec.hidden
        values += [2 * rows, 2 * rows, 3 * rows] if rows else []
        inside_s = sum(self.stream_s(self.value_bytes * v * float(size)) for v in values)
        return self.between_s(spec, size) + inside_s

    def _embedding_s(self, spec: ModelSpec, operation: Operation, size: int) -> float:
        """Rows read and written; backward adds rows of fp32 gradients."""
        row_bytes = 3 * 4 if operation == "backward" else 2 * self.value_bytes
        return self.stream_s(row_bytes * spec.hidden * float(size))

    def head_s(self, spec: ModelSpec, operation: Operation, tp: int, size: int) -> float:
        """Final norm, product with the head, and three fp32 passes over the logits: largest,

        sum of exponentials, and (backward) the gradient. Decode: logits, and a token of each row.
        """
        norm_s = self.stream_s(2 * self.value_bytes * spec.hidden * float(size))
        passes = 2 if operation == "backward" else 1
        if spec.head == "scalar":  # in fp32 on every device
            return passes * (norm_s + self.matmul_s(size, spec.hidden, 1, value_bytes=4))
        columns = -(-spec.vocab // tp)
        seconds = passes * (norm_s + self.matmul_s(size, spec.hidden, columns))
        if operation == "backward":
            weight = MatrixProduct(rows=size, inner=spec.hidden, columns=columns)
            seconds += self.accumulate_s([weight])
        if operation == "decode":
            return seconds + self._sampling_s(spec, size)
        return seconds + 3 * self.stream_s(4.0 * columns * size)

    def _sampling_s(self, spec: ModelSpec, rows: int) -> float:
        """Choosing one token of each of ``rows`` rows of the whole vocabulary's logits."""
        passes_s = self.sampling_passes * 4.0 * rows * spec.vocab / self.memory_bytes_per_s
        return max(passes_s, self.sampling_launches * self.device.launch_s)

    def optimizer_step(self, num_parameters: int) -> Cost:
        """Adam, bytes of every state once read and once written.

        A parameter: gradient read twice (norm, update) and cleared, 12; two moments 16; master
        or fp32 weight 8; and on CUDA the bf16 weight, 2.
        """
        per_parameter = 36 + (2 if self.device.kind == "cuda" else 0)
        return self.modelled(self.stream_s(float(per_parameter) * num_parameters))


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixProduct:
    """``groups`` products [rows, inner] x [inner, columns], each with another matrix."""

    rows: float
    inner: int
    columns: int
    groups: float = 1.0


def block_products(spec: ModelSpec, tp: int, size: int) -> tuple[MatrixProduct, ...]:
    """A block's matrix products for ``size`` tokens on one shard: qkv, o, first and second of the

    feed-forward; with experts also the router.
    """
    q, kv = spec.num_heads * spec.head_dim // tp, spec.held_kv_heads(tp) * spec.head_dim
    attention = (
        MatrixProduct(rows=size, inner=spec.hidden, columns=q + 2 * kv),
        MatrixProduct(rows=size, inner=q, columns=spec.hidden),
    )
    if not spec.num_experts:
        return (*attention, *_feed_forward_products(spec, spec.ffn, tp, size))
    router = MatrixProduct(rows=size, inner=spec.hidden, columns=spec.num_experts)
    shared: tuple[MatrixProduct, ...] = ()
    if spec.shared_ffn:
        shared = _feed_forward_products(spec, spec.shared_ffn, tp, size)
    return (*attention, router, *expert_products(spec, tp, size), *shared)


def expert_products(
    spec: ModelSpec, tp: int, size: int, ep: int = 1
) -> tuple[MatrixProduct, MatrixProduct]:
    """Products of the E / ep experts of a rank, one of ``ep`` that have ``size`` tokens each.

    All experts are taken to be equally likely: a rank gets as many rows as it sends, k size of
    them. Of E experts E (1 - (1 - k / E)^(ep size)) are expected to be given a token: so many
    matrices are read.
    """
    share = spec.experts_per_token / spec.num_experts
    busy = spec.num_experts / ep * (1.0 - (1.0 - share) ** (ep * size))
    rows = size * spec.experts_per_token / busy
    return _feed_forward_products(spec, spec.ffn, tp, rows, busy)


def _feed_forward_products(
    spec: ModelSpec, ffn: int, tp: int, rows: float, groups: float = 1.0
) -> tuple[MatrixProduct, MatrixProduct]:
    columns = (2 if spec.gated else 1) * ffn // tp
    return (
        MatrixProduct(rows=rows, inner=spec.hidden, columns=columns, groups=groups),
        MatrixProduct(rows=rows, inner=ffn // tp, columns=spec.hidden, groups=groups),
    )
