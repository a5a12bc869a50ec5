"""The graph that autograd holds: a window unrolled as a textbook writes it, and what its graph is made of.

This is what `rollout` does without. The published study did not stop the optimizee's gradient: its graph is
the second-order one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rules.base import UpdateRule

LEAVES = "θ0 and φ"
FORWARD = "optimizee forward"
BACKWARD = "optimizee backward"
LEARNED = "learned optimizer"
UPDATE = "θ update"
META_LOSS = "meta-loss"
PARTS = (LEAVES, FORWARD, BACKWARD, LEARNED, UPDATE, META_LOSS)
"""What an operation of an unrolled window belongs to."""


class Place(NamedTuple):
    """Which part of which inner step an operation belongs to."""

    part: str
    step: int | None = None
    """t; None for what belongs to no step."""
    name: str | None = None
    """Of a leaf."""


Observer = Callable[[str, int | None, Iterable[Tensor]], None]
"""(part, t, the tensors that this part has just computed): called part by part while a window is unrolled."""


@dataclass(frozen=True)
class Operation:
    """A node of the graph."""

    kind: str
    """As autograd calls it, without its namespace and number: "SigmoidBackward" becomes "Sigmoid"."""
    place: Place | None
    """None where nobody told."""
    shapes: tuple[tuple[int, ...], ...]
    """Of what it computed."""
    saved: tuple[tuple[int, ...], ...]
    """Of the tensors that it saved for its derivative."""
    saved_bytes: int
    """Of the storages behind those that no operation before it had saved: the sum counts each once."""


@dataclass(frozen=True)
class Graph:
    """A graph in the direction of the computation; the same one comes out the same."""

    operations: tuple[Operation, ...]
    """Every one after all that it depends on."""
    edges: tuple[tuple[int, int], ...]
    """(from, to): indices of operations, one pair for every argument that carries a derivative."""

    @property
    def saved_bytes(self) -> int:
        """What all operations together have saved."""
        return sum(operation.saved_bytes for operation in self.operations)

    def by_part(self) -> dict[str, tuple[int, int]]:
        """(operations, saved bytes) of every part that occurs, in the order of PARTS."""
        totals = {
            part: [op for op in self.operations if op.place is not None and op.place.part == part]
            for part in PARTS
        }
        return {part: (len(ops), sum(op.saved_bytes for op in ops)) for part, ops in totals.items() if ops}


class Places:
    """Remembers, part by part, which operations have come since the last part.

    An operation belongs to the first tensors that it can be reached from: nothing needs to be known of what a
    task or a rule computes. It is an `Observer`.
    """

    def __init__(self) -> None:
        self.of: dict[Node, Place] = {}

    def __call__(self, part: str, step: int | None, tensors: Iterable[Tensor]) -> None:
        """Takes every operation behind the tensors that is not known yet for this part's."""
        for tensor in tensors:
            for node in _topological(tensor.grad_fn, known=self.of):
                self.of[node] = Place(part, step)

    def name_leaves(self, rule: UpdateRule) -> None:
        """Names the leaves, wherever they were first used: φ's as the rule does, the other one θ0."""
        names = {id(parameter): name for name, parameter in rule.named_parameters()}
        for node in self.of:
            if isinstance(variable := getattr(node, "variable", None), Tensor):
                self.of[node] = Place(LEAVES, None, names.get(id(variable), "θ0"))


def unrolled_window(
    rule: UpdateRule,
    optimizees: Optimizees,
    unroll: int,
    second_order: bool,
    observe: Observer | None = None,
) -> Tensor:
    """The meta-loss of the T steps from θ0 on, with the whole window's graph behind it.

    As `Rollout.window` does with second_order. Without, the optimizee's gradient is detached, and the graph
    holds T+1 evaluations of the optimizee and T steps of the rule.

    Args:
        rule: m_φ.
        optimizees: What it optimises, K of them; θ0 is left as it is, the generators advance.
        unroll: T ≥ 1.
        second_order: Keep the graph of the optimizee's gradients too.
        observe: Told of every part's tensors as soon as they are there.

    Returns:
        Mean over the optimizees of Σ_t f_t(θ_t), t = 0 … T: a scalar.

    Example:
        >>> from l2l_lightning import CoordinatewiseLSTM, Quadratic
        >>> optimizees = Optimizees(Quadratic(dim=3), None, seed=0, stream="train", indices=[0])
        >>> unrolled_window(CoordinatewiseLSTM(), optimizees, 5, second_order=True).backward()
    """
    tell = observe or (lambda part, step, tensors: None)
    K, N = optimizees.theta.shape
    theta = optimizees.theta.detach().clone().requires_grad_()
    state = rule.init_state(theta.numel())
    losses = []
    for t in range(unroll + 1):
        losses.append(optimizees.task.losses(theta, optimizees.next_batches()))
        tell(FORWARD, t, [losses[-1]])
        if t < unroll:
            (grad,) = torch.autograd.grad(
                losses[-1].sum(), theta, retain_graph=True, create_graph=second_order
            )
            tell(BACKWARD, t, [grad])
            update, state = rule.step(grad.reshape(-1), state)
            tell(LEARNED, t, [update, state])
            theta = theta + update.view(K, N)
            tell(UPDATE, t, [theta])
    meta_loss = torch.stack(losses).sum(0).mean()
    tell(META_LOSS, None, [meta_loss])
    return meta_loss


def window_graph(rule: UpdateRule, optimizees: Optimizees, unroll: int, second_order: bool) -> Graph:
    """What autograd holds of an unrolled window, every operation in its place. Arguments as unrolled_window.

    Example:
        >>> from l2l_lightning import CoordinatewiseLSTM, Quadratic
        >>> optimizees = Optimizees(Quadratic(dim=3), None, seed=0, stream="train", indices=[0])
        >>> graph = window_graph(CoordinatewiseLSTM(), optimizees, 2, second_order=False)
        >>> list(graph.by_part())
        ['θ0 and φ', 'optimizee forward', 'learned optimizer', 'θ update', 'meta-loss']
    """
    places = Places()
    meta_loss = unrolled_window(rule, optimizees, unroll, second_order, places)
    places.name_leaves(rule)
    return autograd_graph(meta_loss, places.of)


def autograd_graph(output: Tensor, places: Mapping[Node, Place] | None = None) -> Graph:
    """The graph behind a tensor; empty if it carries none.

    Args:
        output: What backward would be called on.
        places: Where operations belong, if that is known.

    Example:
        >>> a = torch.ones(3, requires_grad=True)
        >>> graph = autograd_graph((a * a.exp()).sum())
        >>> [operation.kind for operation in graph.operations]
        ['AccumulateGrad', 'Exp', 'Mul', 'Sum']
        >>> graph.edges
        ((0, 1), (0, 2), (1, 2), (2, 3))
        >>> graph.saved_bytes  # a, exp a: 3 float32 each
        24
    """
    nodes = _topological(output.grad_fn)
    index = {node: i for i, node in enumerate(nodes)}
    seen: set[int] = set()
    operations = []
    for node in nodes:
        saved = _saved_tensors(node)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in saved}
        new_bytes = sum(storage.nbytes() for key, storage in storages.items() if key not in seen)
        seen.update(storages)
        operations.append(
            Operation(
                _kind(node),
                places.get(node) if places else None,
                tuple(tuple(metadata.shape) for metadata in _outputs(node)),
                tuple(tuple(tensor.shape) for tensor in saved),
                new_bytes,
            )
        )
    edges = [(index[source], index[node]) for node in nodes for source in _sources(node)]
    return Graph(tuple(operations), tuple(sorted(edges)))


def _sources(node: Node) -> list[Node]:
    """What a node's arguments came from; next_functions go backwards, as derivatives do."""
    return [source for source, _ in node.next_functions if source is not None]


def _topological(root: Node | None, known: Mapping[Node, Any] | None = None) -> list[Node]:
    """Every node behind the root, each after its sources, those that are known and all behind them left out.

    Keep them for as long as they are compared: autograd makes a node's Python object when asked, and another
    one when that is gone.
    """
    known = known or {}
    order: dict[Node, None] = {}
    # The first visit comes back to the node after its sources; recursion would be as deep as the graph.
    stack = [(root, False)] if root is not None else []
    while stack:
        node, sources_done = stack.pop()
        if node in order or node in known:
            continue
        if sources_done:
            order[node] = None
        else:
            stack.append((node, True))
            stack.extend((source, False) for source in reversed(_sources(node)))
    return list(order)


def _kind(node: Node) -> str:
    return node.name().rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")


def _outputs(node: Node) -> list[Any]:
    # Named for the backward pass, whose inputs are derivatives of the operation's outputs.
    return list(getattr(node, "_input_metadata", ()))


def _saved_tensors(node: Node) -> list[Tensor]:
    """What a node keeps for its derivative: autograd's own nodes by attribute, a Function's in one tuple."""
    values = [getattr(node, name) for name in sorted(dir(node)) if name.startswith("_saved_")]
    values += [getattr(node, "saved_tensors", ())]
    flat = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    return [item for item in flat if isinstance(item, Tensor)]
