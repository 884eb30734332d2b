"""Run by ComfyUI's Python: writes tiny random models of other architectures from ComfyUI's own classes, as bf16 files.

build_models.py COMFYUI_DIR FOLDER        -> FOLDER/random_flux.safetensors, FOLDER/random_wan.safetensors
"""

import sys
from pathlib import Path

comfyui, folder = sys.argv[1], Path(sys.argv[2])
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu"]

import comfy.options  # noqa: E402
import torch  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.ldm.flux.model  # noqa: E402
import comfy.ldm.wan.model  # noqa: E402
import comfy.ops  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

KINDS = {
    "random_flux": (
        comfy.ldm.flux.model.Flux,
        dict(
            image_model="flux",
            in_channels=16,
            out_channels=16,
            patch_size=2,
            vec_in_dim=64,
            context_in_dim=256,
            hidden_size=256,
            mlp_ratio=4.0,
            num_heads=2,
            depth=1,
            depth_single_blocks=1,
            axes_dim=[16, 56, 56],
            theta=10000,
            qkv_bias=True,
            txt_ids_dims=[],
            guidance_embed=False,
        ),
    ),
    "random_wan": (
        comfy.ldm.wan.model.WanModel,
        dict(model_type="t2v", dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=4096, in_dim=16, out_dim=16),
    ),
}

for name, (build, config) in KINDS.items():
    model = build(**config, dtype=torch.bfloat16, device="cpu", operations=comfy.ops.disable_weight_init)
    generator, state = torch.Generator().manual_seed(7), {}
    for key, value in model.state_dict().items():
        if value.dim() > 1:  # fan-in scaling keeps the activations in range, outliers make the formats differ
            w = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
            w[:, ::17] *= 3
        else:
            w = (
                torch.ones(value.shape)
                if key.endswith(("norm_q.weight", "norm_k.weight", "scale", "norm3.weight"))
                else torch.randn(value.shape, generator=generator) * 0.02
            )
        state[key] = w.to(torch.bfloat16).contiguous()
    save_file(state, folder / f"{name}.safetensors", {"format": "pt"})
