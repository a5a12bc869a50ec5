"""The graph that autograd holds: a window unrolled as a textbook writes it, and what its graph is made of.

This is what `rollout` does without. The published study did not stop the optimizee's gradient: its graph is
the second-order one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from l2l_lightning.rollout.optimizees import Optimizees
from l2l_lightning.rules.base import UpdateRule

LEAVES, FORWARD, BACKWARD = "θ0 and φ", "optimizee forward", "optimizee backward"
LEARNED, UPDATE, META_LOSS = "learned optimizer", "θ update", "meta-loss"
PARTS = (LEAVES, FORWARD, BACKWARD, LEARNED, UPDATE, META_LOSS)
"""The parts of an unrolled window; every operation belongs to one."""


class Place(NamedTuple):
    """Says which part of which inner step an operation belongs to."""

    part: str
    step: int | None = None
    """The inner step t; None for what belongs to none."""
    name: str | None = None
    """The name of a leaf."""


class Operation(NamedTuple):
    """A node of the graph."""

    kind: str
    """Autograd's name for it, without namespace and number: "SigmoidBackward0" becomes "Sigmoid"."""
    place: Place | None
    """Where it belongs, if that is known."""
    shapes: tuple[tuple[int, ...], ...]
    """The shapes of what it computed."""
    saved_bytes: int
    """The storages saved for its derivative that no operation before it had saved: a sum counts each once."""


class Graph(NamedTuple):
    """A graph in the direction of the computation; the same computation gives an equal one."""

    operations: tuple[Operation, ...]
    """The operations, each after all that it depends on."""
    edges: tuple[tuple[int, int], ...]
    """Pairs (from, to) of indices of operations, one for every argument that carries a derivative."""

    @property
    def saved_bytes(self) -> int:
        """The bytes that all operations together have saved."""
        return sum(operation.saved_bytes for operation in self.operations)

    def by_part(self) -> dict[str, tuple[int, int]]:
        """Counts (operations, saved bytes) of every part that occurs, in the order of PARTS."""
        placed = [(op.place.part, op.saved_bytes) for op in self.operations if op.place is not None]
        sizes = {part: [size for name, size in placed if name == part] for part in PARTS}
        return {part: (len(saved), sum(saved)) for part, saved in sizes.items() if saved}


def unrolled_window(
    rule: UpdateRule,
    optimizees: Optimizees,
    unroll: int,
    second_order: bool,
    observe: Callable[[Place, Iterable[Tensor]], None] = lambda place, tensors: None,
) -> Tensor:
    """Returns the meta-loss of the T steps from θ0 on, with the whole window's graph behind it.

    With second_order it is what `Rollout.window` computes so. Without, the optimizee's gradient is detached,
    and the graph holds T+1 evaluations of the optimizee and T steps of the rule.

    Args:
        rule: m_φ.
        optimizees: What it optimises, K of them; θ0 is left as it is, the generators advance.
        unroll: T ≥ 1.
        second_order: Keep the graph of the optimizee's gradients too.
        observe: Told of every part's tensors as soon as they are there.

    Returns:
        Mean over the optimizees of Σ_t f_t(θ_t), t = 0 … T: a scalar.
    """
    K, N = optimizees.theta.shape
    theta = optimizees.theta.detach().clone().requires_grad_()
    state = rule.init_state(theta.numel())
    losses = []
    for t in range(unroll + 1):
        losses.append(optimizees.task.losses(theta, optimizees.next_batches()))
        observe(Place(FORWARD, t), [losses[-1]])
        if t < unroll:
            total = losses[-1].sum()
            (grad,) = torch.autograd.grad(total, theta, retain_graph=True, create_graph=second_order)
            observe(Place(BACKWARD, t), [grad])
            update, state = rule.step(grad.reshape(-1), state)
            observe(Place(LEARNED, t), [update, state])
            theta = theta + update.view(K, N)
            observe(Place(UPDATE, t), [theta])
    meta_loss = torch.stack(losses).sum(0).mean()
    observe(Place(META_LOSS), [meta_loss])
    return meta_loss


def window_graph(rule: UpdateRule, optimizees: Optimizees, unroll: int, second_order: bool) -> Graph:
    """Returns what autograd holds of an unrolled window; the arguments are those of unrolled_window.

    An operation belongs to the part whose tensors it was first reached from: nothing needs to be known of
    what a task or a rule computes. Leaves have φ's names, and θ0.

    Example:
        >>> from l2l_lightning import CoordinatewiseLSTM, Quadratic
        >>> optimizees = Optimizees(Quadratic(dim=3), None, seed=0, stream="train", indices=[0])
        >>> graph = window_graph(CoordinatewiseLSTM(), optimizees, 2, second_order=False)
        >>> list(graph.by_part())
        ['θ0 and φ', 'optimizee forward', 'learned optimizer', 'θ update', 'meta-loss']
    """
    places: dict[Node, Place] = {}

    def observe(place: Place, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            places.update(dict.fromkeys(_topological(tensor.grad_fn, places), place))

    meta_loss = unrolled_window(rule, optimizees, unroll, second_order, observe)
    names = {id(parameter): name for name, parameter in rule.named_parameters()}
    for node in places:
        if isinstance(variable := getattr(node, "variable", None), Tensor):
            places[node] = Place(LEAVES, None, names.get(id(variable), "θ0"))
    return autograd_graph(meta_loss, places)


def autograd_graph(output: Tensor, places: Mapping[Node, Place] | None = None) -> Graph:
    """Returns the graph behind a tensor, in which operations have the given places; () and () without one.

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
        storages = {s.data_ptr(): s.nbytes() for s in map(Tensor.untyped_storage, _saved_tensors(node))}
        new_bytes = sum(size for key, size in storages.items() if key not in seen)
        seen.update(storages)
        kind = node.name().rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")
        # Named for the backward pass, whose inputs are derivatives of the operation's outputs.
        shapes = tuple(tuple(output.shape) for output in getattr(node, "_input_metadata", ()))
        operations.append(Operation(kind, (places or {}).get(node), shapes, new_bytes))
    edges = [(index[source], index[node]) for node in nodes for source in _sources(node)]
    return Graph(tuple(operations), tuple(sorted(edges)))


def _sources(node: Node) -> list[Node]:
    """Returns where a node's arguments came from: next_functions go backwards, as derivatives do."""
    return [source for source, _ in node.next_functions if source is not None]


def _topological(root: Node | None, known: Collection[Node] = ()) -> list[Node]:
    """Lists every node behind the root after its sources; the known ones and all behind them are left out.

    Keep them for as long as they are compared: autograd makes a node's Python object when asked, and another
    one when that is gone.
    """
    order: dict[Node, None] = {}
    # The first visit comes back to the node after its sources; recursion would be as deep as the graph.
    stack = [(root, False)] if root is not None else []
    while stack:
        node, sources_done = stack.pop()
        if sources_done:
            order[node] = None
        elif node not in order and node not in known:
            stack.append((node, True))
            stack.extend((source, False) for source in reversed(_sources(node)))
    return list(order)


def _saved_tensors(node: Node) -> list[Tensor]:
    """Lists what a node keeps: autograd's own nodes have it in attributes, a Function's in one tuple."""
    values = [getattr(node, name) for name in sorted(dir(node)) if name.startswith("_saved_")]
    values += [getattr(node, "saved_tensors", ())]
    flat = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    return [item for item in flat if isinstance(item, Tensor)]
