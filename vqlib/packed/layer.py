"""The hard layer, packed and for inference only; a new stage is a new type, there is no mode flag for training."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor, nn

from vqlib import kernels
from vqlib.kernels.bits import bits_for, pack_codes, packed_size, unpack_codes, unpack_range
from vqlib.kernels.products import linear


class VQLinear(nn.Module):
    """A linear layer whose weight [out, in] is read as scale · C[A]: N = out·in/d codes into a codebook [k, d].

    codes: uint8 [ceil(N·ceil(log2 k)/8)], bit-packed (`vqlib.kernels.bits`); codebook: [k, d]; scale: float32 [], 1 unless
    the codebook is shared; bias: [out] or None. Several layers may hold the same codebook tensor. By default the dense
    weight lives only for the length of one call, in a buffer that all layers share; `materialize()` keeps it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        d: int,
        k: int,
        device: torch.device | str | None = None,
        codebook_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Zero weights of the given geometry. Raises ValueError where d does not divide in_features."""
        super().__init__()
        if d < 1 or in_features % d:
            raise ValueError(f"in_features {in_features} is not divisible by d={d}")
        self.in_features, self.out_features, self.d, self.k = in_features, out_features, d, k
        self.code_bits = bits_for(k)
        self.count = out_features * in_features // d
        size = packed_size(self.count, self.code_bits)
        self.register_buffer("codes", torch.zeros(size, dtype=torch.uint8, device=device))
        self.register_buffer("codebook", torch.zeros(k, d, dtype=codebook_dtype, device=device))
        self.register_buffer("scale", torch.ones((), dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)
        self.dense: Tensor | None = None  # no buffer: who offloads a model moves those, and cannot move None

    @classmethod
    def from_assignments(
        cls,
        assignments: Tensor,
        codewords: Tensor,
        shape: tuple[int, int],
        bias: Tensor | None = None,
        scale: Tensor | float = 1.0,
    ) -> VQLinear:
        """The layer of assignments [N] and codewords [k, d] for a weight of `shape` [out, in].

        The codewords are held, so that layers made from one tensor share it; all else is copied. Raises ValueError on sizes that
        do not fit together or on an assignment outside 0 … k − 1.
        """
        (out_features, in_features), (k, d) = shape, codewords.shape
        layer = cls(in_features, out_features, False, d, k, device="meta", codebook_dtype=codewords.dtype)
        if assignments.shape != (layer.count,):
            raise ValueError(
                f"a weight [{out_features}, {in_features}] has {layer.count} sub-vectors of d={d}, "
                f"got assignments of shape {list(assignments.shape)}"
            )
        if bias is not None and bias.shape != (out_features,):
            raise ValueError(f"out_features {out_features} needs a bias of that length, got {list(bias.shape)}")
        if layer.count and not 0 <= int(assignments.min()) <= int(assignments.max()) < k:
            raise ValueError(
                f"assignments {int(assignments.min())} … {int(assignments.max())} reach outside k={k} codewords"
            )
        layer.codes = pack_codes(assignments.detach(), layer.code_bits).to(codewords.device)
        layer.codebook = codewords.detach() if codewords.requires_grad else codewords
        layer.scale = torch.as_tensor(scale, dtype=torch.float32, device=codewords.device).detach().clone().reshape(())
        layer.bias = None if bias is None else bias.detach().clone()
        return layer

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of codes and codebook per weight; a shared codebook is counted in full here."""
        stored = 8 * self.codes.numel() + 8 * self.codebook.element_size() * self.codebook.numel()
        return stored / (self.in_features * self.out_features)

    def assignments(self) -> Tensor:
        """The unpacked codes A, int64 [N]."""
        return unpack_codes(self.codes, self.code_bits, self.count)

    def code_entropy(self) -> float:
        """−Σ p log2 p over the codewords' shares p of the codes, in bits a code: what codes take that are coded one by one."""
        share = torch.bincount(self.assignments()).double() / self.count
        return -float(share.xlogy(share).sum()) / math.log(2)

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight scale · C[A], [out, in]; in the type it is kept in or, where it is not, the codebook's, unless given."""
        if self.dense is not None:
            return self.dense if dtype is None else self.dense.to(dtype)
        return self._gather(dtype or self.codebook.dtype, out=None)

    def materialize(self, dtype: torch.dtype = torch.float32) -> VQLinear:
        """Speed mode: keep the dense weight until `release()`, in `dtype`."""
        self.dense = self._gather(dtype, out=None)
        return self

    def release(self) -> VQLinear:
        """Memory mode: drop the dense weight, rebuild it in every call."""
        self.dense = None
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]; the weight is rebuilt in the dtype of x."""
        dense, bias, dtype = self.dense, self.bias, x.dtype
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        if dense is not None:
            return linear(x, dense if dense.dtype == dtype else dense.to(dtype), bias)
        # Autograd would keep the shared buffer for its backward pass, and a compiler would bake it into the graph.
        private = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
        out = None if private else _scratch(self.count * self.d, x.device, dtype)
        return linear(x, self._gather(dtype, out), bias)

    def extra_repr(self) -> str:
        """Geometry and the figure everyone asks for."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"k={self.k}, d={self.d}, bits_per_weight={self.bits_per_weight:.3f}"
        )

    def _gather(self, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """scale · C[A] into `out` [N·d]: one compiled pass on the CPU, one launch on CUDA."""
        shape = self.out_features, self.in_features
        if torch.compiler.is_compiling():
            table = (self.codebook.float() * self.scale).to(dtype)
            codes = unpack_range(self.codes, self.code_bits, 0, self.count)
            return table.index_select(0, codes).view(shape)  # [N] -> [out, in]
        with torch.no_grad():
            flat = torch.empty(self.count * self.d, dtype=dtype, device=self.codes.device) if out is None else out
            rows = flat.view(self.count, self.d)
            kernels.gather(self.codes, self.code_bits, self.codebook, self.scale, rows)
            return flat.view(shape)  # [N, d] -> [out, in]

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.dense = None  # other codes may come
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse: bool = True) -> VQLinear:
        """As nn.Module, the dense weight too, but the scale stays float32 whatever dtype the rest is moved to."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.dense = None if self.dense is None else fn(self.dense)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self


_buffers = threading.local()


def drop_scratch() -> None:
    """Free this thread's shared buffers; the next layer that needs one makes it anew."""
    _buffers.__dict__.clear()


def _scratch(numel: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The first `numel` elements of this thread's and stream's one buffer for (device, dtype); it grows to the largest layer."""
    held = _buffers.__dict__.setdefault("held", {})
    key = device, dtype, torch.cuda.current_stream(device) if device.type == "cuda" else None
    buffer = held.get(key)
    if buffer is None or buffer.numel() < numel:
        held.pop(key, None)
        with torch.inference_mode(False):  # a buffer born in inference mode could not be written outside of it
            buffer = held[key] = torch.empty(numel, device=device, dtype=dtype)
    return buffer[:numel]
