"""Writes a graph so that TensorBoard shows it: an event file with a GraphDef."""

from __future__ import annotations

from pathlib import Path

from tensorboardX.proto.attr_value_pb2 import AttrValue
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.graph_pb2 import GraphDef
from tensorboardX.proto.node_def_pb2 import NodeDef
from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto as Shape
from tensorboardX.record_writer import RecordWriter

from l2l_lightning.reproduce.autograd_graph import Graph, Operation


def write_events(graph: Graph, folder: Path) -> Path:
    """Writes an event file into a folder of its own; the same graph gives the same bytes.

    Nodes are named "t_03/learned_optimizer/Sigmoid_142": TensorBoard folds them by step and part, and the
    steps, which differ in a number, into a series. A node's attribute saved_bytes is the operation's.
    """
    names = [_name(i, operation) for i, operation in enumerate(graph.operations)]
    nodes = []
    for name, operation in zip(names, graph.operations, strict=True):
        shapes = [Shape(dim=[Shape.Dim(size=size) for size in shape]) for shape in operation.shapes]
        attributes = {
            "_output_shapes": AttrValue(list=AttrValue.ListValue(shape=shapes)),
            "saved_bytes": AttrValue(i=operation.saved_bytes),
        }
        nodes.append(NodeDef(name=name, op=operation.kind, attr=attributes))
    for source, target in graph.edges:
        nodes[target].input.append(names[source])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "events.out.tfevents.graph"  # TensorBoard reads what has "tfevents" in its name
    writer = RecordWriter(str(path))
    writer.write(Event(file_version="brain.Event:2").SerializeToString())
    writer.write(Event(graph_def=GraphDef(node=nodes).SerializeToString()).SerializeToString())
    writer.close()
    return path


def _name(index: int, operation: Operation) -> str:
    place, scopes = operation.place, []
    if place is not None and place.name is not None:
        return "theta_0" if place.name == "θ0" else f"phi/{place.name}"
    if place is not None:
        scopes = [] if place.step is None else [f"t_{place.step:02d}"]
        scopes.append(place.part.replace("θ", "theta").replace(" ", "_"))
    return "/".join([*scopes, f"{operation.kind}_{index}"])
