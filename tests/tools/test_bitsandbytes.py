"""Exchange with bitsandbytes: the bytes it writes and reads, with the real library."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode leaves the folder of the tests out
from comfyui_quantpress.cli.commands.inspect import summarize  # noqa: E402
from comfyui_quantpress.quant_core.checkpoint.source import open_source  # noqa: E402
from comfyui_quantpress.quant_core.errors import InputFileError, PlanError  # noqa: E402
from comfyui_quantpress.quant_core.formats import get_format  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.plan import make_plan  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.request import Request  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.verify import check_file  # noqa: E402
from comfyui_quantpress.quant_core.policy.recipe import Recipe  # noqa: E402
from comfyui_quantpress.quant_core.tools.bitsandbytes import dynamic_map, export_bitsandbytes, quantize_absmax  # noqa: E402
from comfyui_quantpress.quant_core.tools.migrate import migrate  # noqa: E402
from comfyui_quantpress.quant_core.tools.requantize import requantize  # noqa: E402
from tool_files import assert_untouched, bystanders, canonical_file, decoded, save, weight  # noqa: E402

bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
TYPES = ["nf4", "fp4"]


def portable(name: str, *args):
    """The library's portable kernel of an operation, in place of the CPU's own.

    On the CPU quantize_blockwise rounds to 65536 steps before it looks codes up. And dequantize_4bit wrongly decodes
    blocks that run over the ends of rows (relative error 0.58 where the portable kernel has 0.10).
    """
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    return getattr(torch.ops.bitsandbytes, name).default.redispatch(keys, *args)


@pytest.fixture(autouse=True)
def portable_statistics(monkeypatch):
    def quantize_blockwise(values, blocksize):
        code = bnb.create_dynamic_map()
        codes, absmax = portable("quantize_blockwise", values, code, blocksize)
        return codes, bnb.QuantState(absmax=absmax, code=code, blocksize=blocksize, dtype=values.dtype)

    monkeypatch.setattr(bnb, "quantize_blockwise", quantize_blockwise)
    with torch.compiler.set_stance("force_eager"):  # the library would compile its portable kernels: 40 s
        yield


def library_file(
    path: Path, quant_type: str, nested: bool, blocksize: int = 64, k: int = 256, under_layer: bool = False
) -> Path:
    tensors = dict(bystanders())
    for i in range(2):
        packed, state = bnb.quantize_4bit(
            weight(i, k=k), blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
        )
        owner = f"blocks.{i}" if under_layer else f"blocks.{i}.weight"
        tensors |= {f"blocks.{i}.weight": packed} | {
            f"{owner}.{key}": t for key, t in state.as_dict(packed=True).items()
        }
    return save(path, tensors)


def library_decodes(quant_type: str, nested: bool, blocksize: int = 64, k: int = 256) -> dict[str, torch.Tensor]:
    result = {}
    for i in range(2):
        w = weight(i, k=k).float()
        packed, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
        result[f"blocks.{i}"] = portable("dequantize_4bit", packed, absmax, blocksize, quant_type, w.shape, w.dtype)
    return result


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("under_layer", [False, True])
def test_import_decodes_as_the_library_does(tmp_path, quant_type, nested, under_layer):
    source, target = (
        library_file(tmp_path / "lib.safetensors", quant_type, nested, under_layer=under_layer),
        tmp_path / "a.safetensors",
    )
    with open_source(source) as src:
        migrate(src).apply(target)
    expected = library_decodes(quant_type, nested)
    for got in (decoded(source), decoded(target)):
        assert {layer: w.shape for layer, w in got.items()} == {layer: w.shape for layer, w in expected.items()}
        assert all(torch.equal(got[layer], expected[layer]) for layer in expected)
    assert not check_file(target).findings
    with open_source(source) as src:
        touched = {
            name for name in src.tensors if name.startswith(("blocks.0.", "blocks.1.")) and not name.endswith("bias")
        }
    assert_untouched(source, target, touched)
    with open_source(target) as src:
        assert migrate(src).changes() == ()


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_export_writes_the_library_s_bytes(tmp_path, quant_type, nested):
    source, target = canonical_file(tmp_path / "ours.safetensors", f"bnb_{quant_type}"), tmp_path / "out.safetensors"
    with open_source(source) as src:
        export_bitsandbytes(src, nested=nested).apply(target)
    expected = library_file(tmp_path / "lib.safetensors", quant_type, nested)
    with open_source(expected) as want, open_source(target) as got:
        assert {n: (i.dtype, i.shape) for n, i in want.tensors.items()} == {
            n: (i.dtype, i.shape) for n, i in got.tensors.items()
        }
        for name in want.tensors:
            assert torch.equal(want.read_bytes(name), got.read_bytes(name)), name
        assert got.metadata == want.metadata


@pytest.mark.parametrize("quant_type", TYPES)
def test_the_library_reads_the_export(tmp_path, quant_type):
    source, target = canonical_file(tmp_path / "ours.safetensors", f"bnb_{quant_type}"), tmp_path / "out.safetensors"
    with open_source(source) as src:
        export_bitsandbytes(src).apply(target)
    ours = decoded(source)["blocks.0"]
    with open_source(target) as src:
        parts = {
            n.removeprefix("blocks.0.weight."): src.read(n) for n in src.tensors if n.startswith("blocks.0.weight.")
        }
        state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
        state.dtype = torch.float32
        assert torch.equal(bnb.dequantize_4bit(src.read("blocks.0.weight"), state), ours)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "af4"])
def test_out_and_in_again_is_the_same_file(tmp_path, quant_type):
    source, out, back = (
        canonical_file(tmp_path / "a.safetensors", f"bnb_{quant_type}"),
        tmp_path / "b.safetensors",
        tmp_path / "c.safetensors",
    )
    with open_source(source) as src:
        rewrite = export_bitsandbytes(src)
        assert ("AF4" in " ".join(rewrite.notes)) is (quant_type == "af4")
        rewrite.apply(out)
    with open_source(out) as src:
        migrate(src).apply(back)
    assert_untouched(source, back, header=set())


@given(count=st.integers(1, 1100), seed=st.integers(0, 2**31), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_nested_absmax_is_quantized_as_the_library_does(count, seed, scale):
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale
    codes, absmax = portable("quantize_blockwise", values, bnb.create_dynamic_map(), 256)
    ours, scales = quantize_absmax(values)
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())
    assert torch.equal(scales, absmax) and torch.equal(ours, codes)


def test_blocks_that_run_over_rows_are_decoded_and_requantized_but_not_renamed(tmp_path):
    source = library_file(tmp_path / "lib.safetensors", "nf4", False, blocksize=128, k=192)
    expected = library_decodes("nf4", False, blocksize=128, k=192)
    assert all(torch.equal(w, expected[layer]) for layer, w in decoded(source).items())
    with open_source(source) as src, pytest.raises(InputFileError, match="blocks.0.*run over the ends"):
        migrate(src).apply(tmp_path / "a.safetensors")
    report = requantize(Request(source, tmp_path / "b.safetensors", Recipe(get_format("int8_rowwise")), device="cpu"))
    assert report.formats_before == {"bnb_nf4": 2} and 0 < report.run.weight_error < 0.02
    assert not check_file(tmp_path / "b.safetensors").errors


def test_requantizing_to_the_same_format_loses_nothing(tmp_path):
    source, target = canonical_file(tmp_path / "a.safetensors", "int8_rowwise"), tmp_path / "b.safetensors"
    report = requantize(Request(source, target, Recipe(get_format("int8_rowwise")), device="cpu"))
    assert report.run.weight_error < 1e-6
    assert_untouched(source, target, header={"_quantization_metadata", "quantpress"})


def test_export_refuses_other_formats(tmp_path):
    with (
        open_source(canonical_file(tmp_path / "a.safetensors", "mxfp8")) as src,
        pytest.raises(PlanError, match="2 layers.*mxfp8"),
    ):
        export_bitsandbytes(src)


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (("a.qweight", "a.wscales", "a.proj_up"), "SVDQuant"),
        (("a.qweight", "a.qzeros", "a.scales"), "AWQ or GPTQ"),
        (("a.weight_packed", "a.weight_global_scale"), "NVFP4 of compressed-tensors"),
        (("a.SCB",), "LLM.int8"),
    ],
)
def test_other_families_are_named_with_what_to_do(tmp_path, names, family):
    source = save(
        tmp_path / "a.safetensors", {**bystanders(), **{name: torch.zeros(4, dtype=torch.int32) for name in names}}
    )
    with open_source(source) as src:
        for use in (
            migrate,
            lambda src: make_plan(src, Request(src.path, Path("planned"), Recipe(get_format("nvfp4")))),
        ):
            with pytest.raises(InputFileError, match=f"this file is {family}.*[Tt]ake the 16-bit"):
                use(src)
    assert [f["code"] for f in summarize(source)["findings"]] == ["foreign"]


def test_gguf_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x01" * 64)
    with pytest.raises(InputFileError, match="GGUF"):
        open_source(path)
