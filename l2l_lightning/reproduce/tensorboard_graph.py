"""Writes a graph so that TensorBoard shows it: an event file with a GraphDef."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from tensorboardX.proto.attr_value_pb2 import AttrValue
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.graph_pb2 import GraphDef
from tensorboardX.proto.node_def_pb2 import NodeDef
from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboardX.record_writer import RecordWriter

from l2l_lightning.reproduce.autograd_graph import Graph, Operation

FILE_NAME = "events.out.tfevents.graph"
"""The event file's name: TensorBoard reads what has "tfevents" in it, and shows one graph a folder."""


def write_events(graph: Graph, folder: Path) -> Path:
    """Writes an event file into a folder of its own; the same graph gives the same bytes.

    Nodes are named "t_03/learned_optimizer/Sigmoid_142": TensorBoard folds them by step and part, and the
    steps, which differ in a number, into a series. A node's attribute saved_bytes is the operation's.

    Example:
        >>> import tempfile, torch
        >>> from l2l_lightning.reproduce.autograd_graph import autograd_graph
        >>> graph = autograd_graph(torch.ones(2, requires_grad=True).exp().sum())
        >>> write_events(graph, Path(tempfile.mkdtemp())).name
        'events.out.tfevents.graph'
    """
    names = [_name(i, operation) for i, operation in enumerate(graph.operations)]
    inputs: dict[int, list[str]] = defaultdict(list)
    for source, target in graph.edges:
        inputs[target].append(names[source])
    nodes = [
        NodeDef(name=names[i], op=operation.kind, input=inputs[i], attr=_attributes(operation))
        for i, operation in enumerate(graph.operations)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    writer = RecordWriter(str(folder / FILE_NAME))
    writer.write(Event(file_version="brain.Event:2").SerializeToString())
    writer.write(Event(graph_def=GraphDef(node=nodes).SerializeToString()).SerializeToString())
    writer.close()
    return folder / FILE_NAME


def _name(index: int, operation: Operation) -> str:
    place, scopes = operation.place, []
    if place is not None and place.name is not None:
        return "theta_0" if place.name == "θ0" else f"phi/{place.name}"
    if place is not None:
        scopes = [] if place.step is None else [f"t_{place.step:02d}"]
        scopes.append(place.part.replace("θ", "theta").replace(" ", "_"))
    return "/".join([*scopes, f"{operation.kind}_{index}"])


def _attributes(operation: Operation) -> dict[str, AttrValue]:
    shapes = [
        TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in shape])
        for shape in operation.shapes
    ]
    return {
        "_output_shapes": AttrValue(list=AttrValue.ListValue(shape=shapes)),
        "saved_bytes": AttrValue(i=operation.saved_bytes),
    }
