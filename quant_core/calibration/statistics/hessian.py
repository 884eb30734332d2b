"""Accumulators of X^T X: complete (on the device, in RAM or on disk), or a sketch of a few rows.

All hold the plain weighted sum over rows, so that merging is adding; evidence.py divides by the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from ...cancel import poll
from ...errors import RequestError

PANEL = 1024  # rows of X^T X made at a time: it bounds the scratch memory, and spares most of the lower half

# mm with a float32 result from 16-bit factors came with torch 2.8; the products are exact, the sums float32.
_HAS_WIDE_RESULT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


class HessianKind(Enum):
    FULL = "full"
    SKETCH = "sketch"
    DIAGONAL = "diagonal"


class Placement(Enum):
    """Where a complete Hessian lies while it grows."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


def add_gram(total: Tensor, x: Tensor, weight: float) -> None:
    """total += weight * x^T x, in place, in panels of PANEL rows from the diagonal on: the lower half is not made.

    total: float32 [K, K]; x: [n, K], float, on any device. `mirror` fills in the rest.
    """
    wide = _tensor_cores_keep_it_exact(x)
    rows = x if wide else x.to(torch.float32)
    for start in range(0, x.shape[1], PANEL):
        panel, right = rows[:, start : start + PANEL].T, rows[:, start:]
        out = total[start : start + PANEL, start:]
        if out.device != x.device:
            product = torch.mm(panel, right, out_dtype=torch.float32) if wide else panel @ right
            out.add_(_fetched(product, out.device), alpha=weight)
        elif wide:
            torch.addmm(out, panel, right, out_dtype=torch.float32, alpha=weight, out=out)
        else:
            out.addmm_(panel, right, alpha=weight)


def _fetched(product: Tensor, device: torch.device) -> Tensor:
    """On `device`; from a GPU through page-locked memory, which takes a fraction of the time."""
    if not product.is_cuda or device.type != "cpu":
        return product.to(device)
    landing = torch.empty(
        product.shape, dtype=product.dtype, pin_memory=True
    )  # torch keeps such blocks for the next time
    return landing.copy_(product)


def _tensor_cores_keep_it_exact(x: Tensor) -> bool:
    """Products of two bf16 or two fp16 numbers fit float32, so the sums are as good as those of float32 factors."""
    if not x.is_cuda or not _HAS_WIDE_RESULT:
        return False
    # ComfyUI's --fast fp16_accumulation sums fp16 products in fp16.
    return x.dtype is torch.bfloat16 or (
        x.dtype is torch.float16 and not torch.backends.cuda.matmul.allow_fp16_accumulation
    )


def mirror(total: Tensor) -> None:
    """Write what add_gram made right of the diagonal panels below them, in place."""
    for start in range(0, len(total), PANEL):
        total[start + PANEL :, start : start + PANEL] = total[start : start + PANEL, start + PANEL :].T


class FullHessian:
    """The whole float32 [K, K] sum. On HOST and DISK every addition moves half of K^2 numbers and waits for them.

    folder: where a DISK sum makes its file, a memory map; whoever made the folder removes it.
    """

    kind = HessianKind.FULL

    def __init__(
        self,
        in_features: int,
        device: torch.device | str,
        placement: Placement = Placement.DEVICE,
        folder: Path | None = None,
        name: str = "hessian",
    ) -> None:
        self._mirrored = True
        if placement is Placement.DISK:
            if folder is None:
                raise ValueError("a Hessian on disk needs a folder")
            flat = torch.from_file(str(folder / f"{name}.bin"), shared=True, size=in_features**2, dtype=torch.float32)
            self._sum = flat.view(in_features, in_features)
        else:
            where = device if placement is Placement.DEVICE else "cpu"
            self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=where)

    def add(self, x: Tensor, weight: float) -> None:
        """x: [n, K], finite."""
        add_gram(self._sum, x, weight)
        self._mirrored = False

    def total(self) -> Tensor:
        """float32 [K, K], the accumulator itself: do not write into it."""
        if not self._mirrored:
            mirror(self._sum)
            self._mirrored = True
        return self._sum

    def merge(self, other: FullHessian) -> None:
        self._sum.add_(other._sum.to(self._sum.device))
        self._mirrored = self._mirrored and other._mirrored

    def tensors(self) -> dict[str, Tensor]:
        return {"hessian": pack_triangle(self._sum)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of tensors()."""
        unpack_triangle(tensors["hessian"], self._sum)
        self._mirrored = True


class SketchHessian:
    """Frequent directions: `size` rows B whose B^T B never exceeds X^T X, and misses at most `shrinkage` of it.

    The bound holds for the largest eigenvalue of the difference, merges included, and the diagonal that the layer's
    statistics know exactly restores what is missing there. Shrinking factorises, so this one does wait for the GPU.
    Source: Liberty, KDD 2013; Ghashami et al., SIAM J. Comput. 45(5), 2016.
    """

    kind = HessianKind.SKETCH

    def __init__(self, in_features: int, size: int, device: torch.device | str) -> None:
        self.rows = torch.zeros(size, in_features, dtype=torch.float32, device=device)
        self.shrinkage = 0.0
        self._waiting: list[Tensor] = []
        self._waiting_rows = 0

    def add(self, x: Tensor, weight: float) -> None:
        """x: [n, K], finite."""
        size = len(self.rows)
        for piece in x.split(size):
            self._waiting.append(piece.to(self.rows.device, torch.float32) * weight**0.5)
            self._waiting_rows += len(piece)
            if self._waiting_rows >= size:
                self.flush()

    def flush(self) -> None:
        """Shrink sketch and gathered rows back to `size` rows."""
        if not self._waiting:
            return
        stacked = torch.cat([self.rows, *self._waiting])
        self._waiting, self._waiting_rows = [], 0
        size = len(self.rows)
        values, vectors = torch.linalg.eigh((stacked @ stacked.T).to("cpu", torch.float64))
        values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
        cut = float(values[size])
        kept = (values[:size] - cut).clamp(min=0.0)
        ratio = torch.where(values[:size] > 0, (kept / values[:size].clamp(min=1e-300)).sqrt(), torch.zeros_like(kept))
        mix = (vectors[:, :size] * ratio).T.to(self.rows.device, torch.float32)
        self.rows = mix @ stacked
        self.shrinkage += cut

    def total(self, diagonal: Tensor) -> Tensor:
        """float32 [K, K]: B^T B with the exact diagonal put in; positive semidefinite as the true one is.

        diagonal: float [K], that of X^T X.
        """
        self.flush()
        gram = self.rows.T @ self.rows
        missing = (diagonal.to(gram.device, torch.float32) - gram.diagonal()).clamp(min=0.0)
        gram.diagonal().add_(missing)
        return gram

    def merge(self, other: SketchHessian) -> None:
        if other.rows.shape != self.rows.shape:
            raise RequestError(
                f"sketches of {len(self.rows)} and {len(other.rows)} rows cannot be merged. "
                "Capture both with the same sketch size."
            )
        self.flush()
        other.flush()
        self.add(other.rows, 1.0)
        self.flush()
        self.shrinkage += other.shrinkage

    def tensors(self) -> dict[str, Tensor]:
        self.flush()
        return {
            "hessian_sketch": self.rows,
            "hessian_shrinkage": torch.tensor(self.shrinkage, dtype=torch.float64, device="cpu"),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of tensors()."""
        self.rows = tensors["hessian_sketch"].to(self.rows.device)
        self.shrinkage = float(tensors["hessian_shrinkage"])


def pack_triangle(h: Tensor) -> Tensor:
    """The upper triangle of [K, K], row by row, on the CPU: [K * (K + 1) / 2], half the bytes of the matrix."""
    size, at = len(h), 0
    packed = torch.empty(size * (size + 1) // 2, dtype=h.dtype, device="cpu")
    for start in range(0, size, PANEL):
        poll()
        for i, row in enumerate(h[start : start + PANEL].cpu(), start):
            packed[at : at + size - i] = row[i:]
            at += size - i
    return packed


def unpack_triangle(packed: Tensor, out: Tensor) -> None:
    """The inverse of pack_triangle, into out [K, K]."""
    size, at = len(out), 0
    for i in range(size):
        out[i, i:] = packed[at : at + size - i].to(out.device)
        at += size - i
    for start in range(0, size, PANEL):
        block = out[start : start + PANEL, start : start + PANEL]
        block.copy_(block.triu() + block.triu(1).T)
    mirror(out)
