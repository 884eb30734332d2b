"""The demo's whole way: quantize the asset to every format, verify, sample, measure, and write sheet, CSV and JSON."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..quant_core._version import __version__
from ..quant_core.errors import OutputError, RequestError
from ..quant_core.formats import all_formats, get_format
from ..quant_core.formats.base import Format
from ..quant_core.numerics.metrics import snr_db
from ..quant_core.pipeline.compare import verify_file
from ..quant_core.pipeline.request import Request
from ..quant_core.pipeline.run import convert
from ..quant_core.pipeline.verify import VerifyReport
from ..quant_core.policy.recipe import Recipe
from .autoencoder import decode, load_decoder
from .load import LoadedModel, load_model
from .measure import Probe, make_probe, output_snr_db, picture_psnr_db
from .results import FormatRow, write_csv, write_json
from .sampler import Conditioning, load_conditioning, sample, starting_noise
from .sheet import Sheet, SheetRow, draw_sheet

ASSETS = Path(__file__).resolve().parent.parent / "assets"
MODEL = ASSETS / "tiny_mmdit_256.safetensors"
SHEET, CSV, JSON = "sheet.png", "results.csv", "results.json"
FEW_BITS = 6.0  # below it a format stands under the sheet's second heading


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """labels: the classes that are drawn, one column each. steps, cfg: of the Euler sampler."""

    labels: tuple[int, ...] = (0, 6, 2, 8, 4)
    steps: int = 20
    cfg: float = 3.0


@dataclass(frozen=True, slots=True)
class DemoProgress:
    """Sent when a stage begins, and once more when a format is done, with its row.

    stage: "original", "quantize", "verify", "sample", "row", "write". index: formats done.
    format: None outside formats.
    """

    stage: str
    format: str | None
    index: int
    total: int
    row: FormatRow | None = None


@dataclass(frozen=True, slots=True)
class DemoResult:
    """rows: in the order asked for. original_*: the unquantized model, for comparison. seconds: of everything."""

    rows: tuple[FormatRow, ...]
    sheet: Path
    csv: Path
    json: Path
    original_bytes: int
    original_sample_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Reference:
    """What every format is compared with. latents [B, 16, 16, 16], pictures [B, 3, 128, 128]."""

    conditioning: Conditioning
    decoder: nn.Module
    settings: DemoSettings
    seed: int
    probe: Probe
    latents: Tensor
    pictures: Tensor
    sample_seconds: float


def run_demo(
    out_dir: Path,
    formats: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1),
    progress: Callable[[DemoProgress], None] = lambda _: None,
    settings: DemoSettings = DemoSettings(),
) -> DemoResult:
    """Writes <format>.safetensors, sheet.png, results.csv and results.json into out_dir; files of an earlier run go.

    formats: names, None for all. seeds: the first one's pictures are drawn; the one-step error is measured on all of
    them, every class. Raises RequestError, OutputError, VerificationError; quantized files made so far then stay.
    """
    started = time.monotonic()
    chosen = all_formats() if formats is None else tuple(get_format(name) for name in dict.fromkeys(formats))
    _check_request(chosen, seeds, settings)
    _make_folder(out_dir)
    progress(DemoProgress("original", None, 0, len(chosen)))
    reference = make_reference(tuple(seeds), settings)
    rows, pictures = [], []
    for index, fmt in enumerate(chosen):

        def tell(stage: str, name: str = fmt.name, index: int = index) -> None:
            progress(DemoProgress(stage, name, index, len(chosen)))

        row, drawn = _one_format(fmt, out_dir, reference, tell)
        rows.append(row)
        pictures.append(drawn)
        progress(DemoProgress("row", fmt.name, index + 1, len(chosen), row))
    progress(DemoProgress("write", None, len(chosen), len(chosen)))
    result = DemoResult(
        tuple(rows),
        out_dir / SHEET,
        out_dir / CSV,
        out_dir / JSON,
        MODEL.stat().st_size,
        reference.sample_seconds,
        time.monotonic() - started,
    )
    draw_sheet(make_sheet(chosen, rows, pictures, reference)).save(result.sheet, optimize=True)
    write_csv(result.csv, rows)
    write_json(result.json, _about(result, tuple(seeds), settings), rows)
    return result


def make_reference(seeds: tuple[int, ...], settings: DemoSettings) -> Reference:
    """Samples the unquantized model."""
    original = load_model(MODEL).model
    conditioning = load_conditioning(ASSETS / "conditioning.safetensors")
    decoder = load_decoder(ASSETS / "tiny_taesd.safetensors")
    probe = make_probe(original, conditioning, seeds, settings.steps, settings.cfg)
    began = time.monotonic()
    latents = draw(original, conditioning, seeds[0], settings)
    seconds = time.monotonic() - began
    return Reference(conditioning, decoder, settings, seeds[0], probe, latents, decode(decoder, latents), seconds)


def draw(model: nn.Module, conditioning: Conditioning, seed: int, settings: DemoSettings) -> Tensor:
    """Finished latents [B, 16, 16, 16] of the settings' labels."""
    noise = starting_noise(seed, settings.labels)
    return sample(model, conditioning, settings.labels, noise, settings.steps, settings.cfg)[-1]


def _one_format(
    fmt: Format, out_dir: Path, reference: Reference, stage: Callable[[str], None]
) -> tuple[FormatRow, Tensor]:
    """The row, and the pictures [B, 3, 128, 128]."""
    path = out_dir / f"{fmt.name}.safetensors"
    stage("quantize")
    report = convert(Request(MODEL, path, Recipe(fmt), device="cpu", overwrite=True))
    stage("verify")
    verified = verify_file(path, against=MODEL)
    verified.raise_for_errors()
    stage("sample")
    loaded = load_model(path)
    began = time.monotonic()
    latents = draw(loaded.model, reference.conditioning, reference.seed, reference.settings)
    seconds = time.monotonic() - began
    pictures = decode(reference.decoder, latents)
    kept = Counter(layer.reason for layer in report.layers if layer.format is None)
    return FormatRow(
        format=fmt.name,
        file=path.name,
        file_bytes=path.stat().st_size,
        bits_per_weight=_bits_per_weight(loaded),
        weight_snr_db=_weight_snr_db(verified),
        output_snr_db=reference.probe.snr_db(loaded.model, reference.conditioning),
        latent_snr_db=output_snr_db(reference.latents, latents),
        picture_psnr_db=picture_psnr_db(reference.pictures, pictures),
        quantize_seconds=report.seconds,
        sample_seconds=seconds,
        quantized_layers=len(report.quantized),
        kept_layers=kept.total(),
        kept=dict(kept.most_common()),
        runs_through=loaded.runs_through,
    ), pictures


def _bits_per_weight(loaded: LoadedModel) -> float:
    """Codes and scales of the quantized layers, without their JSON (on layers this small it would show)."""
    stored = sum(spec.nbytes for layer in loaded.layers.values() for spec in layer.format.tensor_specs(layer.shape))
    return 8 * stored / sum(math.prod(layer.shape) for layer in loaded.layers.values())


def _weight_snr_db(report: VerifyReport) -> float:
    """Of all layers that were compared, each layer's square error weighted by its number of weights."""
    errors = [(math.prod(check.shape), check.relative_error) for check in report.layers]
    compared = [(weights, error) for weights, error in errors if error is not None]
    squares = sum(weights * error**2 for weights, error in compared)
    return snr_db(math.sqrt(squares / sum(weights for weights, _ in compared)))


def make_sheet(
    chosen: Sequence[Format], rows: Sequence[FormatRow], pictures: Sequence[Tensor], reference: Reference
) -> Sheet:
    """Rows grouped by size, in a group the closest to the original first."""

    def drawn(fmt: Format, row: FormatRow, images: Tensor) -> SheetRow:
        return SheetRow(
            group="Around 4 bits per weight" if row.bits_per_weight < FEW_BITS else "Around 8 bits per weight",
            name=fmt.name,
            title=fmt.title,
            output_snr_db=row.output_snr_db,
            pictures=images,
            facts=(
                f"{row.file_bytes / 1e6:.1f} MB, {row.bits_per_weight:.2f} bits per weight",
                f"output SNR {row.output_snr_db:.1f} dB, picture PSNR {row.picture_psnr_db:.1f} dB",
            ),
        )

    ordered = sorted(
        zip(chosen, rows, pictures, strict=True),
        key=lambda one: (one[1].bits_per_weight < FEW_BITS, -one[1].output_snr_db),
    )
    settings = reference.settings
    return Sheet(
        title="One model, the same noise" + (f", {len(rows)} formats" if len(rows) > 1 else ""),
        subtitle=f"{MODEL.stem}: a small trained diffusion transformer (SD3 layout, 9.1 million numbers), 128 x 128. "
        f"Seed {reference.seed}, Euler, {settings.steps} steps, cfg {settings.cfg:g}. QuantPress {__version__}.",
        columns=tuple(reference.conditioning.names[label] for label in settings.labels),
        original_facts=(f"{MODEL.stat().st_size / 1e6:.1f} MB, 16 bits per weight",),
        original=reference.pictures,
        rows=tuple(drawn(*one) for one in ordered),
    )


def _about(result: DemoResult, seeds: tuple[int, ...], settings: DemoSettings) -> dict[str, object]:
    return {
        "model": MODEL.name,
        "quantpress": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seeds": list(seeds),
        **asdict(settings),
        "original_bytes": result.original_bytes,
        "original_sample_seconds": result.original_sample_seconds,
        "seconds": result.seconds,
    }


def _check_request(chosen: Sequence[Format], seeds: Sequence[int], settings: DemoSettings) -> None:
    if not chosen or not seeds or not settings.labels:
        raise RequestError("the demo needs at least one format, one seed and one class")
    if not 1 <= settings.steps <= 1000:
        raise RequestError(f"the demo was asked for {settings.steps} steps; choose 1 to 1000")


def _make_folder(out_dir: Path) -> None:
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise OutputError(
            f"{out_dir}: the folder cannot be made ({err.strerror}). Choose another with --out."
        ) from err
