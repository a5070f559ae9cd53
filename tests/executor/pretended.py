"""A GPU that is not there: tensors with values whose device is not the host.

Read ``Gpu``. A ``DeviceTensor`` wraps a tensor of the host. It says that it ``is_cuda`` and lies
on torch's device ``meta``, with which, unlike ``cuda``, a build without CUDA runs backward passes.
What mixes it with a tensor of the host fails, as on a device; and while an action is captured so
does what would make a capture fail: a value that is asked for, memory that crosses, a shape that
depends on values. Not here: collectives, streams, and storages that are resized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from executor.model import attention

DEVICE = torch.device("meta")
_aten = torch.ops.aten
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
_ASK = {
    _aten._local_scalar_dense.default, _aten.nonzero.default, _aten.bincount.default,
    _aten.equal.default, _aten.is_nonzero.default, _aten.repeat_interleave.Tensor,
}  # fmt: skip
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}


class DeviceTensor(Tensor):
    """``inner``: its values, on the host."""

    inner: Tensor
    gpu: Gpu
    is_cuda = True  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, gpu: Gpu) -> DeviceTensor:
        made: DeviceTensor = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE,
        )  # fmt: skip
        made.inner, made.gpu = inner, gpu
        return made

    def __init__(self, inner: Tensor, gpu: Gpu) -> None:
        pass

    def __repr__(self, *, tensor_contents: None = None) -> str:
        return f"DeviceTensor({self.inner})"

    def tolist(self) -> Any:
        assert not self.gpu.captures, "a value is asked for in a capture"
        return self.inner.tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": DEVICE, **options})

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        gpu = next(x.gpu for x in tree_leaves((args, kwargs)) if isinstance(x, DeviceTensor))
        return gpu.run(func, args, kwargs or {})


class Gpu(TorchDispatchMode):
    """Within, what is made on ``DEVICE`` has values. ``captured``: actions so far."""

    def __init__(self) -> None:
        super().__init__()
        self.captures = False
        self.captured = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_device(kwargs.get("device")):
            return self.run(func, args, kwargs)
        return func(*args, **kwargs)

    def tensor(self, data: Any, *, device: Any = None, **options: Any) -> Tensor:
        """``torch.tensor``, which itself goes past every mode; ``options`` are its own."""
        made = _tensor(data, **options)
        return made.to(device) if _is_device(device) else made

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator with device tensors, or that makes one."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [leaf for leaf in tensors if isinstance(leaf, DeviceTensor)]
        host = [leaf for leaf in tensors if not isinstance(leaf, DeviceTensor)]
        if here and host and func not in _COPIES:
            # A number of the host is a number, but not in a list of tensors.
            listed = any(isinstance(argument, Sequence) for argument in args)
            numbers = all(leaf.dim() == 0 for leaf in host) and not listed
            assert numbers, f"{func} of the device's tensors and the host's {host}"
        target = kwargs.get("device")
        leaves = bool(here) and target is not None and not _is_device(target)
        if self.captures:
            masks = func in _INDEXED and any(x.dtype == torch.bool for x in tensors[1:])
            crosses = leaves or (bool(host) and func in _COPIES)
            fails = func in _ASK or masks or crosses
            assert not fails, f"{func} in a capture"
        if _is_device(target):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if leaves:
            return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, out)
        if func is _aten.copy_.default and not isinstance(args[0], DeviceTensor):
            return args[0]
        made = tree_map(lambda x: DeviceTensor(x, self) if isinstance(x, Tensor) else x, out)
        return return_and_correct_aliasing(func, args, kwargs, made) if here else made

    def capture(self, action: Callable[[], object]) -> Callable[[], None]:
        """A ``Capture`` whose replays run the action, which may do what a captured one may."""
        self.captured += 1

        def replay() -> None:
            with self._capturing():
                action()

        replay()
        return replay

    @contextmanager
    def _capturing(self) -> Iterator[None]:
        self.captures = True
        try:
            yield
        finally:
            self.captures = False


_tensor = torch.tensor


def _is_device(device: Any) -> bool:
    return device is not None and torch.device(device) == DEVICE


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, DeviceTensor) else leaf


# ---- flash-attn's calls, which fail where its kernels would -------------------------------------


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, *, causal: bool, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """What flash-attn 2.8 checks in ``mha_varlen_fwd``, and the values."""
    _check(q, k, v)
    ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    lengths = []
    for end, most, x in zip(ends, longest, (q, k), strict=True):
        assert all((end.is_cuda, end.dtype == torch.int32, end.is_contiguous()))
        assert type(most) is int
        lengths.append(tuple(end.diff().tolist()))
        assert (sum(lengths[-1]), max(lengths[-1])) == (len(x), most)
    assert causal
    window = window_size[0] + 1 if window_size[1] == 0 else 0
    assert window_size == ((window - 1, 0) if window else (-1, -1))
    return attention._by_segments(q, k, v, lengths[0], lengths[1], window)


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, causal: bool,
    window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """What flash-attn 2.8 checks in ``mha_fwd_kvcache``, and the values."""
    _check(q, k_cache, v_cache)
    num_rows, num_new, num_heads, head_dim = q.shape
    _, num_columns, num_kv_heads, _ = k_cache.shape
    assert (num_new, len(k_cache), k_cache.shape[3]) == (1, num_rows, head_dim)
    assert all((cache_seqlens.is_cuda, cache_seqlens.dtype == torch.int32))
    assert all((cache_seqlens.is_contiguous(), cache_seqlens.shape == (num_rows,)))
    places = torch.arange(num_columns, device=q.device)
    seen = places < cache_seqlens[:, None]
    if window_size[1] == 0:
        seen &= places >= cache_seqlens[:, None] - window_size[0] - 1
    out = F.scaled_dot_product_attention(
        q.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim),
        k_cache.transpose(1, 2), v_cache.transpose(1, 2), attn_mask=seen[:, None, None],
    )  # fmt: skip
    return out.reshape(q.shape)


def _check(*tensors: Tensor) -> None:
    for x in tensors:
        assert all((x.is_cuda, x.dtype == torch.bfloat16, x.stride(-1) == 1))
        assert x.shape[-1] in range(8, 257, 8)
    assert tensors[0].shape[-2] % tensors[1].shape[-2] == 0
