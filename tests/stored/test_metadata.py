"""Layer configs: the bytes ComfyUI parses, strict errors that name the layer, and both places kept in sync."""

import json

import pytest
import safetensors.torch
import torch
from comfyui_quantpress.quant_core.checkpoint.metadata import (
    CONFIG_SUFFIX,
    HEADER_KEY,
    build_header_metadata,
    decode_config,
    encode_config,
    merge_header_metadata,
    parse_header_metadata,
)
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.errors import InputFileError, RequestError
from comfyui_quantpress.quant_core.stored.configs import LayerConfigs, MismatchKind, layer_configs
from hypothesis import given
from hypothesis import strategies as st

NVFP4 = {"format": "nvfp4"}
CONVROT = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256, "per_row": True}

text = st.text(st.characters(codec="utf-8"))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
configs = st.builds(
    lambda name, rest: {"format": name, **{k: v for k, v in rest.items() if k != "format"}},
    text.filter(bool),
    st.dictionaries(text, scalars | st.lists(scalars, max_size=3), max_size=4),
)


def as_tensor(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


@given(configs)
def test_a_config_comes_back_and_comfyui_can_parse_its_bytes(config):
    tensor = encode_config(config)
    assert (tensor.dtype, tensor.dim()) == (torch.uint8, 1)
    assert b"\0" not in tensor.numpy().tobytes()
    assert json.loads(tensor.numpy().tobytes()) == config  # ComfyUI's own line
    assert list(decode_config(tensor, "l").items()) == list(config.items())
    assert decode_config(tensor, "l", lenient=True) == (config, [])


@given(st.dictionaries(text, configs, max_size=4))
def test_header_metadata_comes_back(layers):
    built = build_header_metadata(layers)
    assert json.loads(built) == {"format_version": "1.0", "layers": layers}
    assert parse_header_metadata(built) == layers
    assert parse_header_metadata(built, lenient=True) == (layers, [])


def test_the_bytes_are_those_of_comfyuis_own_save():
    assert encode_config(CONVROT).numpy().tobytes() == json.dumps(CONVROT).encode("utf-8")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "has no format: None was found"),
        ({"format": ""}, "has no format: ''"),
        ({"format": 8}, "has no format: 8"),
        ({**NVFP4, "params": {"group_size": 64}}, "nests an object in 'params'"),
        ({**NVFP4, "scale": float("nan")}, "'scale' = nan; JSON has no NaN"),
        ({**NVFP4, "scales": [1.0, float("-inf")]}, "'scales' = .*; JSON has no NaN or Infinity"),
        ({**NVFP4, "dtype": torch.bfloat16}, "'dtype' = torch.bfloat16, which is not a plain JSON value"),
        ({**NVFP4, "lists": [[1]]}, "'lists' = .* not a plain JSON value or list"),
        ({**NVFP4, 5: 1}, "the key 5; JSON keys are strings"),
        ({"format": "\ud800"}, "not valid Unicode"),
    ],
)
def test_what_is_no_flat_json_object_with_a_format_is_not_written(config, message):
    with pytest.raises(RequestError, match=message):
        encode_config(config)
    with pytest.raises(RequestError, match=message):
        build_header_metadata({"blocks.0": config})


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3), r"blocks.0.comfy_quant is torch.float32 of shape \(3,\); uint8"),
        (torch.zeros(1, 3, dtype=torch.uint8), r"of shape \(1, 3\); uint8 with one dimension"),
        (as_tensor(b""), "is empty"),
        (as_tensor(b"\0\0"), "is empty"),
        (as_tensor(b'{"format": "\xff"}'), "blocks.0.comfy_quant is not UTF-8"),
        (as_tensor(b'{"format": '), "is not JSON"),
        (as_tensor(b'{"format"\0: "nvfp4"}'), "is not JSON"),
        (as_tensor(b'["nvfp4"]'), "is a JSON list"),
        (as_tensor(b'{"format": "a", "format": "b"}'), "'format' more than once"),
        (as_tensor(b'{"group_size": 64}'), "blocks.0.comfy_quant has no format"),
        (as_tensor(b'{"format": "a", "x": NaN}'), "holds 'NaN'"),
        (as_tensor(b'{"format": "a", "x": 1e999}'), "holds '1e999'"),
        (as_tensor(b'{"format": "a", "other": {"x": 1}}'), "nests an object in 'other'"),
    ],
)
@pytest.mark.parametrize("lenient", [False, True])
def test_a_broken_config_is_refused_naming_the_layer(tensor, message, lenient):
    with pytest.raises(InputFileError, match=message) as caught:
        decode_config(tensor, "blocks.0", lenient)
    assert "blocks.0" in str(caught.value)


def test_padding_and_params_are_errors_unless_lenient_which_repairs_and_tells():
    padded = as_tensor(json.dumps(NVFP4).encode() + b"\0\0\0")
    with pytest.raises(InputFileError, match="l.comfy_quant is padded with 3 NUL bytes.*Repair"):
        decode_config(padded, "l")
    config, findings = decode_config(padded, "l", lenient=True)
    assert config == NVFP4
    assert [finding.split(",")[0] for finding in findings] == ["l.comfy_quant is padded with 3 NUL bytes"]

    nested = {"format": "int8_tensorwise", "convrot": True, "params": {"convrot": False, "convrot_groupsize": 64}}
    flat = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}  # the root wins, as in ComfyUI
    with pytest.raises(InputFileError, match="l.comfy_quant nests an object in 'params'"):
        decode_config(as_tensor(json.dumps(nested).encode()), "l")
    config, findings = decode_config(as_tensor(json.dumps(nested).encode()), "l", lenient=True)
    assert config == flat
    assert len(findings) == 1 and "nests convrot, convrot_groupsize in params" in findings[0]

    header = json.dumps({"layers": {"l": nested}})
    with pytest.raises(InputFileError, match="l: the config in _quantization_metadata nests"):
        parse_header_metadata(header)
    layers, findings = parse_header_metadata(header, lenient=True)
    assert layers == {"l": flat}
    assert len(findings) == 1 and findings[0].startswith("l: ")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "_quantization_metadata is not JSON"),
        ("[]", "is a JSON list"),
        ("{}", "layers = None; an object"),
        ('{"layers": []}', "layers = .*; an object"),
        ('{"format_version": "2.0", "layers": {}}', "format_version '2.0'; this pack reads '1.0'"),
        ('{"layers": {"l": "nvfp4"}}', "l: the config in _quantization_metadata is 'nvfp4'"),
        ('{"layers": {"l": {}}}', "l: the config .* has no format"),
        ('{"layers": {"l": {"format": "a"}, "l": {"format": "b"}}}', "'l' more than once"),
        ('{"layers": {"l": {"format": "a", "x": Infinity}}}', "holds 'Infinity'"),
        ("\ud800", "not valid Unicode"),
    ],
)
@pytest.mark.parametrize("lenient", [False, True])
def test_broken_header_metadata_is_refused(header, message, lenient):
    with pytest.raises(InputFileError, match=message):
        parse_header_metadata(header, lenient)


def test_merging_keeps_every_layer_and_refuses_two_stories():
    one, two = build_header_metadata({"a": NVFP4}), build_header_metadata({"b": CONVROT, "a": NVFP4})
    merged = merge_header_metadata([one, two])
    assert merged == build_header_metadata({"a": NVFP4, "b": CONVROT})
    with pytest.raises(InputFileError, match="a: two shards describe it differently"):
        merge_header_metadata([build_header_metadata({"a": NVFP4}), build_header_metadata({"a": CONVROT})])
    with pytest.raises(InputFileError, match="holds '1e999'"):
        merge_header_metadata([one, '{"layers": {"c": {"format": "x", "limit": 1e999}}}'])


@pytest.fixture
def read(tmp_path):
    def write_and_read(tensors: dict[str, bytes], header: str | None, lenient: bool = False) -> LayerConfigs:
        path = tmp_path / "m.safetensors"
        named = {f"{layer}{CONFIG_SUFFIX}": as_tensor(data) for layer, data in tensors.items()}
        others = {"a.weight": torch.zeros(2), "comfy_quant": torch.zeros(2)}  # the second is not a layer's config
        safetensors.torch.save_file({**named, **others}, path, None if header is None else {HEADER_KEY: header})
        with open_source(path) as src:
            return layer_configs(src, lenient)

    return write_and_read


def dumped(config: dict[str, object]) -> bytes:
    return json.dumps(config).encode()


def test_a_file_in_sync_has_no_mismatch_whatever_the_key_order(read):
    turned = dict(reversed(CONVROT.items()))
    found = read({"a": dumped(NVFP4), "b": dumped(CONVROT)}, build_header_metadata({"b": turned, "a": NVFP4}))
    assert found == LayerConfigs({"a": NVFP4, "b": CONVROT}, (), ())


def test_mismatches_name_the_layer_and_the_headers_config_wins(read):
    one = {"format": "int8_tensorwise", "per_row": True}
    other = {"format": "int8_tensorwise", "per_row": 1}  # equal to Python, not to JSON
    found = read(
        {"both": dumped(NVFP4), "t": dumped(NVFP4), "d": dumped(one)},
        build_header_metadata({"both": NVFP4, "h": CONVROT, "d": other}),
    )
    assert found.layers == {"both": NVFP4, "t": NVFP4, "h": CONVROT, "d": other}
    assert found.layers["d"]["per_row"] is not True
    assert {(m.layer, m.kind) for m in found.mismatches} == {
        ("t", MismatchKind.TENSOR_ONLY),
        ("h", MismatchKind.HEADER_ONLY),
        ("d", MismatchKind.DIFFERING),
    }
    (differing,) = (m for m in found.mismatches if m.kind is MismatchKind.DIFFERING)
    assert differing.detail == f"header: {json.dumps(other)}; tensor: {json.dumps(one)}"


def test_a_file_with_neither_has_no_layers(read):
    assert read({}, None) == LayerConfigs({}, (), ())


def test_a_broken_layer_stops_a_strict_reading_and_is_found_by_a_lenient_one(read):
    padded = dumped(NVFP4) + b"\0"
    nested = json.dumps({"layers": {"b": {"format": "x", "params": {"group_size": 64}}}})
    with pytest.raises(InputFileError, match="a.comfy_quant is padded"):
        read({"a": padded}, None)
    with pytest.raises(InputFileError, match="b: the config in _quantization_metadata nests"):
        read({}, nested)
    found = read({"a": padded}, nested, lenient=True)
    assert found.layers == {"a": NVFP4, "b": {"format": "x", "group_size": 64}}
    assert [finding.split(" ")[0] for finding in found.findings] == ["a.comfy_quant", "b:"]
