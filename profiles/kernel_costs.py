"""``KernelCosts``: a layer's seconds as the sum of its measured kernels, for any model.

Forward: the products of ``roofline.block_products`` and attention from shipped tables;
element-wise kernels, experts' grouped products, embedding and optimizer from the roofline, which
is said in the answer's shares. Backward is modelled from shapes: of each product the gradient of
its input [m, n] x [n, k] and of its weight [k, m] x [m, n], looked up in the same table, and
attention times ``attention_backward``. Decode steps that are CUDA graphs are sums of the kernels
alone, without what starting each costs the host; others' kernels are at least as long as that.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy

from profiles.costs import Component, Cost, Operation, Provenance
from profiles.kernels import KernelSurfaces
from profiles.models import ModelSpec
from profiles.roofline import MatrixProduct, RooflineCosts, block_products


class KernelCosts:
    """``LayerCosts`` from ``surfaces``, and ``roofline`` for the kernels that no table has.

    A product in a long run takes ``sustained`` times the same product measured alone, as its
    table's header says (1.1, from 512 rows, columns and values inside on). Vidur, which times
    whole layers, takes 1.11 to 1.15 (A100) and 1.08 to 1.22 (H100) times aiconfigurator's seconds
    at 1024 to 4096 rows, in the median of each number of rows, and 0.98 to 1.03 below 128, where
    memory bounds. ``scripts/validate_profiles.py`` prints both.

    ``attention_backward``: seconds of the backward kernel over the forward's. 2.5 times the
    FLOPs (five products instead of two: Dao 2023, FlashAttention-2, section 4.1).
    """

    def __init__(
        self,
        surfaces: KernelSurfaces,
        roofline: RooflineCosts,
        *,
        attention_backward: float = 2.5,
    ) -> None:
        self.surfaces = surfaces
        self.roofline = roofline
        self.attention_backward = attention_backward
        self._launch_s = roofline.device.launch_s
        self._answers: dict[tuple[object, ...], Cost] = {}
        self._products: dict[tuple[object, ...], Cost] = {}
        self.in_graph: KernelCosts | None = None  # the same of kernels in a CUDA graph
        if roofline.in_graph is not None:
            self.in_graph = copy(self)
            self.in_graph.roofline = roofline.in_graph
            self.in_graph._launch_s = 0.0  # measured kernels are as short as they can be
            self.in_graph._answers, self.in_graph._products = {}, {}

    def layer(
        self, spec: ModelSpec, component: Component, operation: Operation, *, tp: int, size: int,
        length: int,
    ) -> Cost:  # fmt: skip
        """See ``costs.LayerCosts``."""
        if operation == "decode" and spec.decode_is_static and self.in_graph is not None:
            return self.in_graph.layer(spec, component, operation, tp=tp, size=size, length=length)
        question = (spec, component, operation, tp, size, length)
        answer = self._answers.get(question)
        if answer is None:
            if component == "block":
                answer = self._block(spec, operation, tp, size, length)
            elif component == "head" and spec.head == "lm":
                answer = self._head(spec, operation, tp, size, length)
            else:
                answer = self.roofline.layer(
                    spec, component, operation, tp=tp, size=size, length=length
                )
            self._answers[question] = answer
        return answer

    def optimizer_step(self, num_parameters: int) -> Cost:
        """See ``costs.LayerCosts``; from the memory's peak rate."""
        return self.roofline.optimizer_step(num_parameters)

    # ---- parts --------------------------------------------------------------------------------

    def _block(
        self, spec: ModelSpec, operation: Operation, tp: int, size: int, length: int
    ) -> Cost:
        question = (spec, operation, tp, size)  # all but attention: no length
        linear = self._products.get(question)
        if linear is None:
            passes = 2 if operation == "backward" else 1
            shapes = block_products(spec, tp, size)
            streams_s = passes * self.roofline.elementwise_s(spec, tp, size)
            if operation == "backward":
                streams_s += self.roofline.accumulate_s(shapes)
            products = self._all_products(shapes, operation)
            streams = self.roofline.modelled(streams_s)
            linear = self._products[question] = Cost.total([streams, *products])
        return Cost.total([linear, self._attention(spec, operation, tp, size, length)])

    def _head(self, spec: ModelSpec, operation: Operation, tp: int, size: int, length: int) -> Cost:
        """The roofline's head with its product measured."""
        whole = self.roofline.layer(spec, "head", operation, tp=tp, size=size, length=length)
        product = MatrixProduct(rows=size, inner=spec.hidden, columns=-(-spec.vocab // tp))
        passes = 2 if operation == "backward" else 1
        bound_s = self.roofline.matmul_s(product.rows, product.inner, product.columns)
        rest = self.roofline.modelled(max(0.0, whole.seconds - passes * bound_s))
        return Cost.total([rest, *self._all_products([product], operation)])

    def _all_products(
        self, products: Iterable[MatrixProduct], operation: Operation
    ) -> Iterable[Cost]:
        for product in products:
            m, k, n = product.rows, product.inner, product.columns
            if product.groups != 1.0:  # one kernel over all experts: in no table
                passes = 2 if operation == "backward" else 1
                grouped_s = self.roofline.matmul_s(m, k, n, groups=product.groups)
                yield self.roofline.modelled(passes * grouped_s)
            elif operation == "backward":
                yield _as_backward(self._product(m, k, n))
                # The longer side of the weight as columns: the tables' columns reach further.
                yield _as_backward(self._product(min(k, n), max(k, n), m))
            else:
                yield self._product(m, n, k)

    def _product(self, m: float, n: float, k: float) -> Cost:
        cost = self.surfaces.product(m, n, k)
        table = self.surfaces.gemm.table
        slower = table.sustained if min(m, n, k) >= table.sustained_from else 1.0
        seconds = max(slower * cost.seconds, self._launch_s)
        source = cost.source if slower == 1.0 else f"{cost.source}, x {slower:g} sustained"
        return Cost(seconds, cost.provenance, source=source)

    def _attention(
        self, spec: ModelSpec, operation: Operation, tp: int, size: int, length: int
    ) -> Cost:
        heads = max(1, spec.num_heads // tp)
        decode = operation == "decode"
        if self.roofline.eager and not decode:  # in no table
            eager_s = self.roofline.self_attention_s(spec, operation, tp, size, length)
            return self.roofline.modelled(eager_s)
        alone = self.surfaces.attention(
            decode=decode, batch=size if decode else size / length, length=length, heads=heads,
            kv_heads=min(heads, spec.held_kv_heads(tp)), head_dim=spec.head_dim,
        )  # fmt: skip
        if operation == "backward":
            seconds = max(self.attention_backward * alone.seconds, self._launch_s)
            modelled = Cost(seconds, Provenance.ROOFLINE, source=alone.source)
            return _as_backward(modelled)
        return Cost(max(alone.seconds, self._launch_s), alone.provenance, source=alone.source)


def _as_backward(cost: Cost) -> Cost:
    """No table holds a backward pass: its kernels are forward kernels of the gradients' shapes."""
    source = f"{cost.source}; backward modelled from its shapes"
    return Cost(cost.seconds, cost.provenance, source=source)
