"""The kernels compile for GPUs that this machine does not have: Triton's compiler needs none.

In a process of its own, because Triton decides when a kernel is defined whether to interpret or to compile it.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install --no-deps triton")

COMPILE_ALL = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from comfyui_quantpress.layouts.kernels import jit

INTEGERS = {name: "i32" for name in ("m", "n", "k", "kb", "group_rows", "groups", "length")}
FLOATS = {"scale": "*fp32", "a_scale": "*fp32", "b_scale": "*fp32", "codebook": "*fp32", "x": "*bf16", "bias": "*bf16",
          "out": "*bf16"}
CODES = {"nibble": "*u8", "fp8": "*u8", "int8": "*i8"}
GROUPED = {"GROUP": 64, "WHOLE_ROW": False}


def shared(kernel, codes, options=None, **constants):
    types = {**INTEGERS, **FLOATS, "codes": codes, "a": codes, "b": codes}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # As at a launch with aligned tensors and sizes; only then are loads pipelined through shared memory.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants}
    source, target = ASTSource(kernel, signature, places, aligned), GPUTarget("cuda", 90, 32)
    built = triton.compile(source, options=options or {}, target=target)
    return built.metadata.shared


def biggest():
    for kind, codes in CODES.items():
        book = {} if kind == "nibble" else {"codebook": None}
        yield shared(jit.decode_kernel, codes, KIND=kind, **GROUPED, **book, BN=16, BK=256)
        yield shared(jit.gemv_kernel, codes, KIND=kind, **GROUPED, **book, HAS_BIAS=True, BN=4, BK=1024)
        tiles = {"HAS_BIAS": True, "BM": 64, "BN": 64, "BK": 64, "GM": 8}
        yield shared(jit.decode_dot_kernel, codes, KIND=kind, **GROUPED, **book, **tiles)
    for codes in ("*i8", "*fp8e4nv"):
        integer = codes == "*i8"
        blocks = {"GROUP": 128, "WHOLE_ROW": False, "ONE_BLOCK_ROW": False, "INTEGER": integer}
        tiles = {"HAS_BIAS": True, "BM": 128, "BN": 128, "BK": 128, "GM": 8}
        yield shared(jit.scaled_dot_kernel, codes, {"num_warps": 8, "num_stages": 4}, **blocks, **tiles)
        yield shared(jit.quantize_groups_kernel, codes, LARGEST=127.0, INTEGER=integer, ROWS=8, BLOCK=128)

print(json.dumps(max(biggest())))
"""


def test_every_kernel_compiles_for_hopper_and_fits_in_its_shared_memory(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run([sys.executable, "-c", COMPILE_ALL], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    largest = json.loads(run.stdout.splitlines()[-1])
    assert 64 * 1024 < largest <= 227 * 1024  # the lower bound: the loads were pipelined, as at a real launch
