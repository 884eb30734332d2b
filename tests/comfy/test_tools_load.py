"""Each form that the tools claim to read, put right by its tool, in the stock loader: does it sample as its source?

The files of all forms are written once and loaded in three processes: a ComfyUI without this pack, one with it for the
formats that are the pack's own, and one that is made to multiply in fp8, where activation scales count.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from comfy_server import missing
from loading import Loaded, start
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))  # tool_files
from form import OURS, Form, canonical, decoded  # noqa: E402
from forms_described import DESCRIPTIONS  # noqa: E402
from forms_families import FAMILIES, LIBRARY  # noqa: E402
from forms_legacy import EDITS, LEGACY  # noqa: E402
from forms_scales import SCALES  # noqa: E402

FORMS = [*LEGACY, *DESCRIPTIONS, *SCALES, *FAMILIES, *LIBRARY, *EDITS]
FORMATS = sorted({form.format for form in FORMS})
# Stock reads these, in another precision than the tool's result asks for: the tool was told to change it.
OTHER_PRECISION = {"edit-full-precision", "legacy-cleanup", "migrate-full-precision"}
# Formats whose runtime quantizes a layer's inputs on any device, so that the weights alone do not give the latents.
BY_INPUTS = {"int8_tensorwise": 0.1, "int8_rowwise": 0.1, "int8_convrot": 0.1, "convrot_w4a4": 0.6}


@dataclass(frozen=True, slots=True)
class Results:
    stock: Loaded
    ours: Loaded
    fp8: Loaded

    def of(self, form: Form) -> Loaded:
        return self.ours if form.ours else self.stock


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    if missing():
        pytest.skip(missing())
    folder = tmp_path_factory.mktemp("forms")
    stock, ours, fp8 = [], [], []
    for name in FORMATS:
        path = canonical(name).write(folder / f"canonical-{name}.safetensors")
        plain = folder / f"decoded-{name}.safetensors"
        save_file(decoded(name), plain)
        (ours if name in OURS else stock).extend(
            [{"id": f"canonical/{name}", "file": path}, {"id": f"decoded/{name}", "file": plain}]
        )
    for form in FORMS:
        before, after = form.write(folder)
        mine = ours if form.ours else stock
        stock.append({"id": f"before/{form.name}", "file": before})
        mine.append({"id": f"after/{form.name}", "file": after})
        if form.truth is not None:
            file = canonical(form.format)
            form.truth(file)
            mine.append({"id": f"truth/{form.name}", "file": file.write(folder / f"truth-{form.name}.safetensors")})
        if form.stock == "same" and form.format == "float8_e4m3fn":
            fp8 += [
                stock[-1] | {"id": f"{when}/{form.name}", "file": file}
                for when, file in (("before", before), ("after", after))
            ]
    running = [start("stock", folder, stock), start("ours", folder, ours, pack=True)]
    mine = running[1].result()  # two at a time
    yield Results(ours=mine, fp8=start("fp8", folder, fp8, fp8=True).result(), stock=running[0].result())
    shutil.rmtree(folder)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_what_the_tool_writes_loads_and_samples_as_the_canonical_file_does(results, form):
    found, expected = results.of(form), f"truth/{form.name}" if form.truth else f"canonical/{form.format}"
    assert found.difference(f"after/{form.name}", expected) == 0
    assert found.known[f"after/{form.name}"] == found.known[expected] and found.known[expected]["quantized"] >= 17


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_what_stock_comfyui_makes_of_the_form_before(results, form):
    """Where it reads the form itself, the tool's file gives the same latents, bit for bit. Else it was needed."""
    if form.stock == "fails":
        assert results.stock.error(f"before/{form.name}")
        return
    after = results.stock if not form.ours else results.ours
    both = Loaded({**results.stock.latents, **after.latents}, {**results.stock.known, **after.known})
    assert (both.difference(f"before/{form.name}", f"after/{form.name}") == 0) is (form.stock == "same")


@pytest.mark.parametrize(
    "form",
    [form for form in FORMS if form.stock == "same" and form.format == "float8_e4m3fn"],
    ids=lambda form: form.name,
)
def test_on_a_device_that_multiplies_in_fp8_too(results, form):
    """Here inputs are quantized with input_scale, or with 1 where there is none."""
    differs = results.fp8.difference(f"before/{form.name}", f"after/{form.name}")
    assert (differs > 0.001) is (form.name in OTHER_PRECISION)


@pytest.mark.parametrize("name", FORMATS)
def test_the_canonical_files_sample_as_their_decoded_weights_do(results, name):
    found = results.ours if name in OURS else results.stock
    assert found.difference(f"canonical/{name}", f"decoded/{name}") < BY_INPUTS.get(name, 0.002)
    layouts = found.known[f"canonical/{name}"]["layouts"]
    assert len(layouts) == 1 and layouts[0].startswith("QuantPress") is (name in OURS)
