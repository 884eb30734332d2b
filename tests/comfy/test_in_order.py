"""Quantizing in order of execution in a real ComfyUI: the graph's own model is replayed beside the conversion."""

import pytest
import torch
from comfy_server import WorkflowError
from safetensors.torch import load_file, save_file
from test_nodes_calibration import Calibrating, snr_db

CLASSES, HELD_OUT = (0, 3, 5, 8), (101, 102)


class InOrder(Calibrating):
    """collected: the calibration of four classes x 20 steps, with `calls` calls kept."""

    def __init__(self, classes=CLASSES, steps=20, calls=64, **settings):
        super().__init__(calls=calls, **settings)
        self.collected = self.collect(self.capture_all(classes, steps))

    def quantized(self, model=None, source="trained_sd3", calibration=True, **recipe):
        links = {"model": (model, 0)} if model is not None else {}
        links |= {"calibration": (self.collected, 0)} if calibration else {}
        recipe = {"format": "nvfp4", "scales": "auto", "rounding": "auto", **recipe}
        return self.quantize(self.source(source), **recipe, **links)


def test_quantized_in_order_in_one_graph_and_sampled(server):
    graph = InOrder()
    nodes = {
        "nearest": graph.quantized(calibration=False, scales="absmax", rounding="nearest"),
        "plain": graph.quantized(),
        "ordered": graph.quantized(graph.original),
    }
    for name, node in [("original", None), *nodes.items()]:
        model = graph.original if node is None else graph.add("QuantPressLoadQuantized", quantized=(node, 0))
        for label in CLASSES:
            for seed in HELD_OUT:
                graph.add(
                    "SaveLatent",
                    samples=(graph.draw(model, label, seed), 0),
                    filename_prefix=f"order_{name}_{label}_{seed}",
                )
    texts = server.run(graph)
    report = texts[nodes["ordered"]]["text"][0]
    assert "in order" in report and "in order" not in texts[nodes["plain"]]["text"][0] and "warning" not in report, (
        report
    )
    gains = {
        name: [
            snr_db(original, server.latent(f"order_{name}_{label}_{seed}"))
            - snr_db(original, server.latent(f"order_nearest_{label}_{seed}"))
            for label in CLASSES
            for seed in HELD_OUT
            for original in [server.latent(f"order_original_{label}_{seed}")]
        ]
        for name in ("plain", "ordered")
    }
    print(
        "latent SNR gain over nearest in dB, means:",
        {name: round(sum(found) / len(found), 2) for name, found in gains.items()},
    )
    assert sum(gains["ordered"]) / len(gains["ordered"]) > 3.0 and gains["ordered"] != gains["plain"]


def test_the_same_graph_gives_the_same_bytes_and_the_capture_model_serves_too(server):
    graph = InOrder((1, 2, 4, 6), 4, rows_per_step=33)
    for name, model in (("one", graph.original), ("two", graph.capture)):
        node = graph.quantized(
            model, seed={"one": 0, "two": 1}[name]
        )  # another seed: not the spooled file of the first
        graph.add("QuantPressSave", quantized=(node, 0), folder="output", name=f"order_{name}", overwrite=True)
    server.run(graph)
    one, two = (load_file(server.base / f"output/order_{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    patched = graph.add("ModelMergeSimple", model1=(graph.original, 0), model2=(graph.original, 0), ratio=0.5)
    graph.add(
        "PreviewAny", source=(graph.quantized(patched, seed=0), 1)
    )  # its file is there, from the model that fitted
    with pytest.raises(WorkflowError, match="of its weights are patched"):
        server.run(graph)


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("other weights", "has other weights than trained_sd3.safetensors"),
        ("other calibration", "belongs to another model: the model has no"),
        ("patched", "of its weights are patched"),
        ("quantized", "Load the unquantized model"),
        ("no calls", "of at least 4 pictures or prompts, better of twenty; the calibration holds 0 calls of 0"),
        ("one picture", "the calibration holds 6 calls of 1"),
        ("no calibration", "needs the calibration too"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_nothing_stays(server, case, wrong):
    graph = InOrder(
        (1,) if case == "one picture" else (1, 2, 4, 6), 3, 0 if case == "no calls" else 64, rows_per_step=19
    )
    model = graph.original
    if case == "other weights":
        tensors = load_file(server.base / "models/diffusion_models/trained_sd3.safetensors")
        save_file(
            {name: tensor * 1.5 for name, tensor in tensors.items()},
            server.base / "models/diffusion_models/louder_sd3.safetensors",
        )
        model = graph.unet("louder_sd3.safetensors")
    if case == "other calibration":
        model = graph.unet("random_flux.safetensors")
    if case == "patched":
        model = graph.add("ModelMergeSimple", model1=(graph.original, 0), model2=(graph.original, 0), ratio=0.5)
    if case == "quantized":
        first = graph.quantized(calibration=False, scales="absmax", rounding="nearest")
        model = graph.add("QuantPressLoadQuantized", quantized=(first, 0))
    source = "random_flux" if case == "other calibration" else "trained_sd3"
    node = graph.quantized(model, source, case != "no calibration", keep="joint_blocks.1")
    graph.add(
        "QuantPressSave", quantized=(node, 0), folder="output", name=f"order_{case.replace(' ', '_')}", overwrite=True
    )
    with pytest.raises(WorkflowError, match=wrong):
        server.run(graph)
    assert not list(server.base.glob("output/order_" + case.replace(" ", "_") + "*"))
