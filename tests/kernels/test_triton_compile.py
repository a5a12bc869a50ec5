"""The Triton kernels compiled ahead of time for GPUs that are not here: they fit, and they address 64 bits.

benchmarks/compile_report.py compiles the whole table; here is what is quick and what is closest to spilling.
"""

import re

import pytest
from l2l_kernels import LSTMSpec
from l2l_kernels.triton import aot, configs
from l2l_kernels.triton.aot import TARGETS, compile_report
from l2l_kernels.triton.bptt import bptt_layer_bwd_kernel
from l2l_kernels.triton.step import step_fwd_kernel

# Bytes per thread that a layer's backward may spill, by padded hidden size. Triton 3.9's worst are 84, 36 and
# 504 (at 64 those of sm_80 and sm_90; sm_100 and gfx942 spill nothing there); the rest allows for drift.
BPTT_SPILL_BYTES = {16: 128, 32: 64, 64: 768}
REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Of an H100 that issues 132 · 4 · 1.7e9 a second: 10⁹ steps take less than 223 and 400 ms of it.
STEP_INSTRUCTIONS, BPTT_INSTRUCTIONS = 200, 360


@pytest.mark.parametrize(
    ("target", "num_layers", "hidden_size"),
    [
        *((target, *shape) for target in TARGETS for shape in [(1, 16), (2, 20)]),
        ("sm_80", 2, 64),  # an upper layer where it spills, …
        ("sm_90", 2, 64),
        ("sm_100", 1, 64),  # … and one layer where nothing does
        ("gfx942", 1, 64),
    ],
)
def test_the_kernels_fit_in_registers(target, num_layers, hidden_size, record_property):
    reports = list(compile_report(LSTMSpec(num_layers, hidden_size), [target]))
    layers = [f"bptt[{layer}]" for layer in reversed(range(num_layers))]
    assert [report.kernel for report in reports] == ["step", *layers]
    for report in reports:
        record_property(report.kernel, str(report))
        assert 32 < report.registers <= REGISTERS[target]  # 32 with spills: the assembler gave up
        assert report.shared_bytes <= SHARED_BYTES[target]
    step, *backward = reports
    assert step.spill_bytes == 0
    for report in backward:
        assert report.spill_bytes <= BPTT_SPILL_BYTES[configs.pad(hidden_size)]


def test_the_20x2_kernels_are_few_instructions():
    step, *backward = compile_report(LSTMSpec(num_layers=2, hidden_size=20), ["sm_90"])
    assert 100 < step.instructions["total"] <= STEP_INSTRUCTIONS
    assert 100 < sum(layer.instructions["total"] for layer in backward) <= BPTT_INSTRUCTIONS


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("num_layers", "hidden_size", "state_dtype"), [(3, 64, "fp32"), (1, 20, "bf16")])
def test_the_step_does_not_spill(target, num_layers, hidden_size, state_dtype):
    spec = LSTMSpec(num_layers, hidden_size)
    step = next(compile_report(spec, [target], state_dtype))
    assert step.kernel == "step"
    assert step.spill_bytes == 0
    assert step.registers > 32
    assert step.shared_bytes <= SHARED_BYTES[target]


def test_addresses_are_64_bit_before_they_are_multiplied():
    """No product or sum of 32 bits may scale with the number of coordinates: 10⁸ of them overflow it."""
    spec = LSTMSpec(num_layers=2, hidden_size=20)
    for kernel, config in [
        (step_fwd_kernel, configs.step_config(spec)),
        (bptt_layer_bwd_kernel, configs.bptt_config(spec, 1)),
        (bptt_layer_bwd_kernel, configs.bptt_config(spec, 0)),
    ]:
        ttir = aot.compile_kernel(kernel, *config, "sm_90", "bf16").asm["ttir"]
        # … nor with the step, the block or the program.
        counters = re.findall(r"(%\S+) = tt.get_program_id", ttir) + re.findall(r"scf.for (%\S+) =", ttir)
        grows = {"%N", "%T", *counters}
        narrow = [
            line.strip()
            for line in ttir.splitlines()
            if re.search(r"= arith\.muli .*: (?:tensor<\S*xi32>|i32)", line)
            and grows & set(re.findall(r"%[\w#]+", line.split("=", 1)[1]))
        ]
        assert narrow == []
        wide = re.findall(r"(%\S+) = arith\.extsi %N\S* : i32 to i64", ttir)
        assert wide, "N is nowhere extended to 64 bits"


def test_nothing_is_compiled_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        next(compile_report(LSTMSpec()))
