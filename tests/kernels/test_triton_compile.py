"""The Triton kernels compiled ahead of time for GPUs that are not here: they fit, and they address 64 bits.

How many registers they spill and how many instructions they take differs from one Triton to the next:
benchmarks/compile_report.py says it, with the version.
"""

import re

import pytest
import torch
from l2l_kernels import LSTMSpec, triton
from l2l_kernels.triton import aot, configs
from l2l_kernels.triton.aot import LIMITS, TARGETS, compile_nominal, compile_report
from l2l_kernels.triton.bptt import bptt_layer_bwd_kernel
from l2l_kernels.triton.step import step_fwd_kernel

SHAPES = [(1, 16), (2, 20), (3, 64)]
QUICK = ("sm_90", 1, 16, "bf16")
OTHERS = [
    pytest.param(target, *shape, dtype, marks=pytest.mark.slow)
    for target in TARGETS
    for shape, dtype in zip(SHAPES, ("bf16", "fp32", "bf16"), strict=True)
    if (target, *shape, dtype) != QUICK
]


@pytest.mark.parametrize(("target", "num_layers", "hidden_size", "state_dtype"), [QUICK, *OTHERS])
def test_the_kernels_compile_and_fit_the_device(target, num_layers, hidden_size, state_dtype):
    """Spills and instructions are the compiler's and are reported; a device's limits are what must hold.

    Whether 16 divides the number of coordinates or not: Triton compiles the two to different code.
    """
    spec = LSTMSpec(num_layers, hidden_size)
    reports = list(compile_report(spec, [target], state_dtype))
    names = ["step", *(f"bptt[{i}]" for i in reversed(range(num_layers)))]
    assert [(r.kernel, r.divisible) for r in reports] == [(name, d) for name in names for d in (True, False)]
    for report in reports:
        assert_fits(report, target)
        assert report.state_dtype == state_dtype


def assert_fits(report, target):
    assert 0 < report.registers <= LIMITS[target].registers
    assert report.spill_bytes >= 0
    assert 0 <= report.shared_bytes <= LIMITS[target].shared_kib * 1024
    assert report.programs_at_once >= 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "bf16"])
@pytest.mark.parametrize("target", [target for target in TARGETS if target != "gfx1100"])
def test_a_device_holds_the_backward_in_every_precision(target, precision, monkeypatch):
    """A device of 99 KiB, too; and half as many programs again as fit would wait for the others to end."""
    monkeypatch.setattr(configs.precisions, "bptt", precision)
    spec = LSTMSpec(2, 20)
    for report in compile_report(spec, [target], divisible=(False,)):
        assert_fits(report, target)
        if report.kernel != "step":
            layer = int(report.kernel[5])
            planned = configs.programs_at_once(spec, layer, target)
            assert planned / 1.5 <= report.programs_at_once <= 1.5 * planned


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_alternative_compiles(target):
    """Whether it fits is a matter of the device's limits, which `run` would meet by name.

    For other devices, and for numbers of coordinates that are divisible by 16, compile_report.py does it.
    """
    reports = list(compile_report(LSTMSpec(2, 20), [target], divisible=(False,), alternatives=True))
    counts = {
        kernel: sum(target != "gfx942" or config.max_registers is None for config in alternatives)
        for kernel, alternatives in configs.ALTERNATIVES.items()
    }
    assert len(reports) == counts["step"] + 2 * counts["bptt"]
    assert {r.launches for r in reports} == {1, 2}


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        *(((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_80"), ((8, 9), "sm_86"), ((9, 0), "sm_90")),
        *(((10, 0), "sm_100"), ((10, 3), "sm_100"), ((11, 0), "sm_100"), ((12, 0), "sm_86")),
    ],
)
def test_the_family_of_a_device(capability, expected):
    assert configs.family_of(capability) == expected


def test_a_device_with_little_shared_memory_keeps_no_exact_weights_there(monkeypatch):
    monkeypatch.setattr(configs.precisions, "bptt", "tf32x3")
    residents = {family: configs.bptt_config(LSTMSpec(2, 20), 1, family)[0]["RESIDENT"] for family in TARGETS}
    assert [family for family, resident in residents.items() if not resident] == ["sm_86"]


@pytest.mark.parametrize("hidden_size", [4, 20, 64])
@pytest.mark.parametrize("family", TARGETS)
def test_a_specs_precision_goes_before_the_process(family, hidden_size):
    """And a step that is asked to round is not computed in lanes, which do not."""
    spec = LSTMSpec(2, hidden_size, precision="bf16")
    assert configs.step_config(spec, family)[0]["PRECISION"] == "bf16"
    assert configs.bptt_config(spec, 1, family)[0]["PRECISION"] == "bf16"
    usual = configs.bptt_config(LSTMSpec(2, hidden_size), 1, family)[0]["PRECISION"]
    assert usual == configs.dot_precision(configs.precisions.bptt, family)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(
    "target", [t if t == "sm_90" else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS]
)
def test_the_nominal_step_compiles_and_spills_nothing(target, aligned, shared):
    """And a thread moves 16 bytes at once where tensors are aligned: ten loads of them, and eight stores."""
    report = compile_nominal(target, aligned, shared)
    assert_fits(report, target)
    assert report.spill_bytes == 0
    if not target.startswith("gfx"):
        moves = report.instructions["global"] * report.block / report.num_warps
        assert moves < 30 if aligned else moves > (46 if shared else 60)


@pytest.mark.slow
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
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_nominal("sm_90")


def test_float64_is_refused_by_name():
    spec = LSTMSpec(1, 4)
    tensors = {"theta": torch.zeros(3), "inputs": torch.zeros(3)}
    tensors |= {"state": torch.zeros(*spec.state_shape, 3), "phi": torch.zeros(spec.num_parameters)}
    for name, tensor in tensors.items():
        given = tensors | {name: tensor.double()}
        with pytest.raises(TypeError, match=rf"takes {name} as .*'reference'"):
            triton.step_(**given, new_state=torch.zeros(*spec.state_shape, 3), spec=spec)
