"""A source file in a few lines."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ...quant_core.checkpoint.source import open_source
from ...quant_core.errors import counted
from ...quant_core.stored.layers import stored_layers
from ..shared.detection import Detection


def describe_source(path: Path, detection: Detection) -> str:
    with open_source(path) as source:
        dtypes: Counter[str] = Counter()
        for info in source.tensors.values():
            dtypes[info.dtype] += info.nbytes
        matrices = sum(len(info.shape) == 2 for info in source.tensors.values())
        quantized = Counter(layer.format.name for layer in stored_layers(source).values())
        shards = f" in {len(source.files)} shards" if len(source.files) > 1 else ""
        lines = [
            f"{path.name}{shards}",
            f"architecture: {detection.model or 'not known to this ComfyUI'}",
            f"size: {source.nbytes / 1e9:.3f} GB, {counted(len(source.tensors), 'tensor')}, "
            f"{counted(matrices, 'matrix', 'matrices')}",
            "dtypes: "
            + ", ".join(f"{name} {size / max(1, source.nbytes):.0%}" for name, size in dtypes.most_common(4)),
        ]
    if quantized:
        lines.append(
            "already quantized: "
            + ", ".join(f"{count} x {name}" for name, count in quantized.items())
            + ". Each is decoded with its own scales first; the 16-bit model would lose less."
        )
    return "\n".join(lines)
