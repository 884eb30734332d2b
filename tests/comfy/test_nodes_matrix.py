"""Every format on three architectures: quantize in the graph, sample, save, load with the stock node, sample again."""

import pytest
from comfy_server import Graph, Server, relative_error
from comfyui_quantpress.quant_core.formats import all_formats

MODELS = ("trained_sd3", "random_flux", "random_wan")
# A latent's relative error after four steps with cfg 3, as a multiple of the weights' own. Measured: 3.5, 1.4 and 2.1.
AMPLIFICATION = {"trained_sd3": 4.5, "random_flux": 2.0, "random_wan": 3.0}
# Formats whose runtime also quantizes the activations: their error comes on top of the weights'.
ACTIVATION_ERROR = {"convrot_w4a4": 0.12, "int8_tensorwise": 0.02}


@pytest.fixture(scope="module")
def references(server: Server) -> dict[str, object]:
    """The latent of each model in its own dtype."""
    for model in MODELS:
        graph = Graph()
        unet = graph.unet(f"{model}.safetensors")
        graph.sample(unet, unet, f"ref/{model}", video="wan" in model)
        server.run(graph)
    return {model: server.latent(f"ref/{model}") for model in MODELS}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fmt", [fmt.name for fmt in all_formats()])
def test_in_graph_and_reloaded_sample_bit_identically_and_close_to_bf16(server, references, model, fmt):
    graph, video, name = Graph(), "wan" in model, f"matrix/{model}-{fmt}"
    original = graph.unet(f"{model}.safetensors")
    quantized = graph.quantize(graph.source(model), format=fmt)
    in_graph = graph.add("QuantPressLoadQuantized", quantized=(quantized, 0))
    graph.sample(in_graph, original, f"{name}-graph", video=video)
    saved = graph.add(
        "QuantPressSave", quantized=(quantized, 0), folder="diffusion_models", name=name, overwrite=False
    )
    graph.sample(graph.unet((saved, 0)), original, f"{name}-file", video=video)
    outputs = server.run(graph)

    in_graph, reloaded = server.latent(f"{name}-graph"), server.latent(f"{name}-file")
    assert (in_graph == reloaded).all()
    text = outputs[quantized]["text"][0]
    weight_error = float(text.partition("weight error: ")[2].partition("%")[0]) / 100
    error = relative_error(in_graph, references[model])
    assert 0 < error <= AMPLIFICATION[model] * (weight_error + ACTIVATION_ERROR.get(fmt, 0.01))
