"""Models under diffusers' names, whose scales ComfyUI leaves behind: each tool that writes such layers says so."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode leaves the folder of the tests out
from comfyui_quantpress.quant_core.checkpoint.source import open_source  # noqa: E402
from comfyui_quantpress.quant_core.formats import get_format  # noqa: E402
from comfyui_quantpress.quant_core.names.diffusers import diffusers_warning  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.plan import make_plan  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.request import Request  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.run import convert  # noqa: E402
from comfyui_quantpress.quant_core.policy.general import Policy  # noqa: E402
from comfyui_quantpress.quant_core.policy.recipe import Recipe  # noqa: E402
from comfyui_quantpress.quant_core.tools.migrate import migrate  # noqa: E402
from comfyui_quantpress.quant_core.tools.repair import repair  # noqa: E402
from tool_files import save, weight  # noqa: E402

SIGNS = {
    "SD3": ("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"),
    "Flux": ("x_embedder.weight", "single_transformer_blocks.0.attn.to_q.weight"),
    "Z-Image": ("noise_refiner.0.attention.norm_k.weight", "noise_refiner.0.attention.to_k.weight"),
}


@pytest.mark.parametrize("model", SIGNS)
def test_planning_migrating_and_diagnosing_warn(tmp_path, model):
    plain = save(tmp_path / "plain.safetensors", {name: weight(i) for i, name in enumerate(SIGNS[model])})
    recipe = Recipe(get_format("float8_e4m3fn"))
    with open_source(plain) as src:
        assert [
            w
            for w in make_plan(src, Request(src.path, Path("planned"), recipe, Policy(only=(".",)))).warnings
            if f"diffusers' names ({model})" in w
        ]
        assert migrate(src).notes == ()  # nothing is quantized: it loads
    report = convert(Request(plain, tmp_path / "q.safetensors", recipe, Policy(only=(".",)), device="cpu"))
    assert any("diffusers' names" in str(warning) for warning in report.warnings)
    with open_source(tmp_path / "q.safetensors") as src:
        assert any("diffusers' names" in note for note in migrate(src).notes)
        assert [finding.code for finding in repair(src).unfixed] == ["diffusers-names"]


def test_comfyuis_own_names_are_no_reason_to_warn():
    for names in (
        {"x_embedder.weight", "layers.0.attention.qkv.weight", "noise_refiner.0.attention.k_norm.weight"},  # Z-Image
        {"x_embedder.proj.weight", "pos_embed", "joint_blocks.0.x_block.attn.qkv.weight"},  # SD3
        {
            "img_in.weight",
            "transformer_blocks.0.attn.add_q_proj.weight",
            "transformer_blocks.0.attn.to_q.weight",
        },  # Qwen-Image
        {"input_blocks.0.0.weight", "time_embed.0.weight"},
    ):  # SDXL
        assert diffusers_warning(names) is None
