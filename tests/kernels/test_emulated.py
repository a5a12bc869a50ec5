"""The CPU kernels for processors that are not here, compiled by zig and run in qemu, against the reference.

    pip install ziglang        # a C++ compiler for every target
    apt install qemu-user-static

Skipped where either is missing.
"""

import importlib.util
import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backend_cases import Case, inputs
from l2l_kernels import reference
from l2l_kernels.cpu import library
from test_backend_contract import relative_error

EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
CASES = [
    Case(2, 20, "log_sign", N=131, T=3),
    Case(1, 5, "identity", N=1, T=1),
    Case(2, 29, "features", N=70, T=2, width=7, output="tanh"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if EMULATOR is None or importlib.util.find_spec("ziglang") is None:
        pytest.skip("needs qemu-user-static and ziglang")
    path = tmp_path_factory.mktemp("emulated") / "program"
    flags = [flag for flag in library.FLAGS if flag not in ("-shared", "-fPIC")]
    command = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", "-static", *flags]
    sources = [*library.SOURCES, Path(__file__).with_name("emulated.cpp")]
    subprocess.run([*command, *map(str, sources), "-o", str(path)], check=True)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_neon_gives_what_the_reference_gives(case, program, tmp_path):
    x, spec = inputs(case), case.spec
    flags = spec.preprocessing == "log_sign", spec.width, spec.output == "tanh"
    packed = struct.pack("5q2d", spec.num_layers, spec.hidden_size, *flags, spec.p, spec.output_scale)
    state = math.prod(spec.state_shape) * case.N
    step_inputs = math.prod(spec.input_shape(case.N))
    packed += struct.pack("6q", case.N, case.T, step_inputs, state, spec.num_parameters, 0)
    tensors = (x.theta, x.inputs, x.history, x.d_updates, x.d_final_state, x.phi)
    (tmp_path / "in").write_bytes(packed + b"".join(t.contiguous().numpy().tobytes() for t in tensors))
    command = [EMULATOR, str(program), str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "NEON"
    found = torch.frombuffer(bytearray((tmp_path / "out").read_bytes()), dtype=torch.float32)
    exact = [t.double() for t in tensors]
    theta, new_state = reference.step(exact[0], exact[1][0], exact[2][0], exact[5], spec)
    d_phi, d_state = reference.bptt(*exact[1:4], exact[4], exact[5], spec)
    expected = [theta, new_state, d_phi, d_state]
    parts = torch.split(found, [e.numel() for e in expected])
    for actual, value in zip(parts, expected, strict=True):
        assert relative_error(actual.view_as(value), value) < 3e-5
