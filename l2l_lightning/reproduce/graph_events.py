"""Writes a graph so that TensorBoard shows it: an event file with a GraphDef."""

from __future__ import annotations

import struct
from collections import defaultdict
from pathlib import Path

from tensorboardX.proto.attr_value_pb2 import AttrValue
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.graph_pb2 import GraphDef
from tensorboardX.proto.node_def_pb2 import NodeDef
from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboardX.record_writer import masked_crc32c

from l2l_lightning.files import write_atomically
from l2l_lightning.reproduce.autograd_graph import Graph, Operation

FILE_NAME = "events.out.tfevents.graph"
"""TensorBoard reads what has "tfevents" in its name; it shows one graph for every folder."""


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
    events = [Event(file_version="brain.Event:2"), Event(graph_def=graph_def(graph).SerializeToString())]
    path = folder / FILE_NAME
    write_atomically(path, b"".join(_record(event.SerializeToString()) for event in events))
    return path


def graph_def(graph: Graph) -> GraphDef:
    """The graph as TensorFlow's message, in the order of its operations."""
    names = [_name(i, operation) for i, operation in enumerate(graph.operations)]
    inputs: dict[int, list[str]] = defaultdict(list)
    for source, target in graph.edges:
        inputs[target].append(names[source])
    return GraphDef(
        node=[
            NodeDef(name=name, op=operation.kind, input=inputs[i], attr=_attributes(operation))
            for i, (name, operation) in enumerate(zip(names, graph.operations, strict=True))
        ]
    )


def _name(index: int, operation: Operation) -> str:
    place = operation.place
    if place is None:
        scopes = []
    elif place.name is not None:
        return "theta_0" if place.name == "θ0" else f"phi/{place.name}"
    else:
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


def _record(message: bytes) -> bytes:
    """A record of a TFRecord file: length and message, each with its checksum."""
    length = struct.pack("<Q", len(message))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, message)]
    return length + checksums[0] + message + checksums[1]
