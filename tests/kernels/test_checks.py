"""No pointer is taken of a tensor that does not fit: every argument wrong in every way, on every backend."""

import pytest
import torch
from l2l_kernels import (
    BACKENDS,
    Coefficients,
    LSTMSpec,
    SizeHead,
    bptt,
    nominal_sizes,
    nominal_step,
    step,
    step_,
)

SPEC, T, N = LSTMSpec(num_layers=1, hidden_size=4), 3, 6


def arguments(operator):
    phi, state = torch.zeros(SPEC.num_parameters), torch.zeros(*SPEC.state_shape, N)
    if operator is bptt:
        window = {"inputs": torch.ones(T, N), "history": torch.zeros(T + 1, *SPEC.state_shape, N)}
        return {**window, "d_updates": torch.ones(T, N), "d_final_state": state, "phi": phi}
    both = {"theta": torch.ones(N), "inputs": torch.ones(N), "state": state, "phi": phi}
    return both | ({"new_state": torch.zeros_like(state)} if operator is step_ else {})


WRONG = {
    "longer": lambda x: torch.zeros(*x.shape[:-1], x.shape[-1] + 1),
    "shorter": lambda x: x[..., 1:],
    "one number": lambda x: torch.ones(1),
    "a dimension more": lambda x: x[None],
    "without dimensions": lambda x: torch.ones(()),
    "empty": lambda x: x[..., :0],
    "integers": lambda x: x.long(),
    "booleans": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "another device": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
}
# Each argument in a wrong size, number of dimensions, dtype, device and layout; their other ways in turn.
ALWAYS = ("longer", "one number", "a dimension more", "another device", "sparse")
ARGUMENTS = [(operator, name) for operator in (step_, step, bptt) for name in arguments(operator)]
CASES = [
    (operator, name, wrong)
    for turn, (operator, name) in enumerate(ARGUMENTS)
    for number, wrong in enumerate(WRONG)
    if wrong in ALWAYS or number % 8 == turn % 8
]


@pytest.mark.parametrize(
    ("operator", "name", "wrong"), CASES, ids=[f"{o.__name__}-{n}-{w}" for o, n, w in CASES]
)
def test_an_argument_that_does_not_fit_is_named_by_every_backend_alike(operator, name, wrong):
    """The named error, and nothing is written; the backend is not even looked for."""
    messages = set()
    for backend in (*BACKENDS, None):
        given = arguments(operator)
        given[name] = WRONG[wrong](given[name])
        before = {key: tensor.clone() for key, tensor in given.items() if tensor.device.type == "cpu"}
        with pytest.raises(ValueError, match=rf"\b{name}\b|phi is on") as refused:
            operator(**given, spec=SPEC, backend=backend)
        messages.add(str(refused.value))
        for key, tensor in before.items():
            assert torch.equal(given[key].to_dense(), tensor.to_dense()), key
    assert len(messages) == 1


def test_the_registered_operators_check_as_well():
    """A tensor that holds its numbers' negatives is theirs to resolve: PyTorch does before they see it."""
    given = arguments(bptt)
    constants = (*SPEC.to_lists(), "")
    with pytest.raises(ValueError, match="inputs and d_updates must be"):
        torch.ops.l2l_kernels.bptt(*{**given, "d_updates": torch.ones(1)}.values(), *constants)
    theta, grad, state, phi, new_state = arguments(step_).values()
    with pytest.raises(ValueError, match="theta and inputs must be"):
        torch.ops.l2l_kernels.step_(theta, grad[:1], state, new_state, phi, *constants)
    expected = step(theta, -grad, state, phi, SPEC)
    for ours, theirs in zip(step(theta, torch._neg_view(grad), state, phi, SPEC), expected, strict=True):
        assert torch.equal(ours, theirs)


STATE, P = (*SPEC.state_shape, N), SPEC.num_parameters


def shared(size, **starts_and_shapes):
    memory = torch.zeros(size)
    return {
        name: memory[start : start + torch.Size(shape).numel()].view(shape)
        for name, (start, shape) in starts_and_shapes.items()
    }


OVERLAPS = {
    "theta in inputs": shared(N, theta=(0, (N,)), inputs=(0, (N,))),
    "theta in state": shared(100, theta=(3, (N,)), state=(0, STATE)),
    "theta in new_state": shared(100, theta=(47, (N,)), new_state=(0, STATE)),
    "theta in phi": shared(P, theta=(0, (N,)), phi=(0, (P,))),
    "new_state in inputs": shared(100, new_state=(0, STATE), inputs=(1, (N,))),
    "new_state in phi": shared(P, new_state=(0, STATE), phi=(0, (P,))),
    "new_state beside state": shared(100, new_state=(1, STATE), state=(0, STATE)),
    "new_state is state transposed": {
        "state": (square := torch.zeros(STATE)),
        "new_state": square.as_strided(STATE, (48, 4, 1, 8)),
    },
    "theta is expanded": {"theta": torch.ones(1).expand(N)},
    "new_state is expanded": {"new_state": torch.zeros(*STATE[:-1], 1).expand(STATE)},
    "new_state overlaps itself": {"new_state": torch.zeros(100).as_strided(STATE, (48, 24, 5, 1))},
}


@pytest.mark.parametrize("kind", OVERLAPS)
def test_what_is_written_overlaps_nothing(kind):
    for backend in (*BACKENDS, None):
        with pytest.raises(ValueError, match="overlap"):
            step_(**arguments(step_) | OVERLAPS[kind], spec=SPEC, backend=backend)


def nominal_arguments():
    return {
        "targets": [torch.ones(2, 3), torch.ones(4)],
        "grads": [torch.ones(2, 3), torch.ones(4)],
        "statistics": torch.zeros(3, 10),
        "offsets": [0, 6],
        "sizes": torch.ones(2, 2),
        "moves": [True, True],
        "coefficients": Coefficients(*[0.5] * 8),
    }


MEMORY = torch.zeros(3, 10)
NOMINAL = {
    "one gradient less": ({"grads": [torch.ones(2, 3)]}, "targets, grads and moves must be as many"),
    "one flag less": ({"moves": [True]}, "targets, grads and moves must be as many"),
    "one offset less": ({"offsets": [0]}, "an offset for each tensor"),
    "an offset below 0": ({"offsets": [-1, 6]}, "offsets must not be negative"),
    "offsets that overlap": ({"offsets": [0, 5]}, "two tensors the same statistics"),
    "an offset too high": ({"offsets": [0, 7]}, "end at 11, and the statistics have 10"),
    "a gradient of another shape": ({"grads": [torch.ones(3, 2), torch.ones(4)]}, r"grads\[0\] must have"),
    "whole numbers": ({"grads": [torch.ones(2, 3), torch.ones(4).int()]}, r"grads\[1\] must be dense"),
    "a sparse target": ({"targets": [torch.ones(2, 3).to_sparse(), torch.ones(4)]}, r"targets\[0\] must be"),
    "another device": (
        {"targets": [torch.ones(2, 3), torch.ones(4, device="meta")]},
        r"targets\[1\] must be",
    ),
    "statistics of bfloat16": (
        {"statistics": torch.zeros(3, 10).bfloat16()},
        "statistics must be float32 or",
    ),
    "one row of statistics": ({"statistics": torch.zeros(1, 10)}, r"statistics must be \[3, N\]"),
    "transposed statistics": ({"statistics": torch.zeros(10, 3).T}, "and contiguous"),
    "sizes of another dtype": ({"sizes": torch.ones(2, 2).double()}, "sizes must be"),
    "sizes of one tensor": ({"sizes": torch.ones(1, 2)}, "sizes must be"),
    "one target twice": ({"targets": [(one := torch.ones(2, 3)), one.view(-1)[:4]]}, "must not overlap"),
    "a target in the statistics": (
        {"statistics": MEMORY, "grads": [torch.ones(2, 3), MEMORY[0, :4]]},
        "overlap",
    ),
    "an expanded target": ({"targets": [torch.ones(3).expand(2, 3), torch.ones(4)]}, "one number twice"),
}


@pytest.mark.parametrize("case", NOMINAL)
def test_a_nominal_step_names_what_does_not_fit(case):
    """The named error, on every backend alike, and nothing is written."""
    given, message = nominal_arguments() | NOMINAL[case][0], NOMINAL[case][1]
    for backend in (*BACKENDS, None):
        with pytest.raises(ValueError, match=message):
            nominal_step(**given, backend=backend)
    assert not given["statistics"].any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sums": torch.ones(2, 2).double()}, r"must be \[tensors, 3\]"),
        ({"decays": torch.ones(1)}, r"must be \[tensors, 3\]"),
        ({"sums": torch.ones(2, 3)}, "sums must be torch.float64"),
        ({"decays": torch.ones(2).double()}, "float32 or float64"),
        ({"decays": torch.ones(2, device="meta")}, "decays and log_sizes must be on"),
    ],
)
def test_nominal_sizes_name_what_does_not_fit(wrong, message):
    given = {"sums": torch.ones(2, 3).double(), "log_sizes": torch.ones(2), "decays": torch.ones(2)}
    for backend in (*BACKENDS, None):
        with pytest.raises(ValueError, match=message):
            nominal_sizes(**given | wrong, head=SizeHead(*[0.5] * 10), backend=backend)


def test_autograd_notices_that_a_nominal_step_has_moved_a_tensor():
    x = nominal_arguments()
    x["targets"][0].requires_grad_()
    loss = x["targets"][0].square().sum()
    with torch.no_grad():
        nominal_step(**x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
