"""Constants of a frozen TensorFlow graph (GraphDef, a .pb file), read without TensorFlow."""

import functools

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from diffusion_jax import paths
from diffusion_jax.paths import Path

FLOAT = 1  # of tensorflow/core/framework/types.proto
Field = descriptor_pb2.FieldDescriptorProto
# message -> name of a field: number, type, repeated; the few fields that constants need
LAYOUT = {
    "Graph": {"node": (1, "Node", True)},
    "Node": {"name": (1, Field.TYPE_STRING, False), "op": (2, Field.TYPE_STRING, False), "attr": (5, "Attr", True)},
    "Attr": {"key": (1, Field.TYPE_STRING, False), "value": (2, "Value", False)},
    "Value": {"tensor": (8, "Tensor", False)},
    "Tensor": {
        "dtype": (1, Field.TYPE_INT32, False),
        "tensor_shape": (2, "Shape", False),
        "tensor_content": (4, Field.TYPE_BYTES, False),
        "float_val": (5, Field.TYPE_FLOAT, True),
    },
    "Shape": {"dim": (2, "Dim", True)},
    "Dim": {"size": (1, Field.TYPE_INT64, False)},
}


@functools.cache
def graph_message() -> type[message.Message]:
    """The class of a graph, with the fields of `LAYOUT`."""
    file = descriptor_pb2.FileDescriptorProto(name="graph.proto", package="graph", syntax="proto3")
    for name, fields in LAYOUT.items():
        message_proto = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            label = Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
            field_proto = message_proto.field.add(name=field, number=number, label=label)
            if isinstance(kind, str):
                field_proto.type, field_proto.type_name = Field.TYPE_MESSAGE, f".graph.{kind}"
            else:
                field_proto.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("graph.Graph"))


def read_constants(path: str | Path) -> dict[str, np.ndarray]:
    """The float32 constants of a graph by name. Raises ValueError for a file that is no graph, FileNotFoundError."""
    graph = graph_message()()
    try:
        graph.ParseFromString(paths.fetched(path).read_bytes())
    except message.DecodeError as error:
        raise ValueError(f"{path} is no frozen TensorFlow graph: {error}") from error
    tensors = {
        node.name: attr.value.tensor
        for node in graph.node
        if node.op == "Const"
        for attr in node.attr
        if attr.key == "value" and attr.value.tensor.dtype == FLOAT
    }
    return {name: _array(tensor, f"{path}, {name}") for name, tensor in tensors.items()}


def _array(tensor: message.Message, source: str) -> np.ndarray:
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    values = np.frombuffer(tensor.tensor_content, "<f4") if tensor.tensor_content else np.float32(tensor.float_val)
    if values.size == 1:  # one value stands for all
        return np.full(shape, values.reshape(-1)[0])
    if values.size != np.prod(shape):
        raise ValueError(f"{source} has {values.size} numbers for a shape of {shape}")
    return values.reshape(shape)
