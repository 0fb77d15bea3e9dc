"""Reads the constants of a frozen TensorFlow graph (.pb), without TensorFlow.

The messages come with tensorboardX. A constant has its values as bytes
(`tensor_content`), or as a list in a field of its type, in which a missing tail repeats
the last value.

Source: TensorFlow's tensor.proto.
"""

from __future__ import annotations

import math
import pathlib

import numpy as np

# Numbers of the enumeration DataType, with the field of values of each.
_TYPES = {
    1: (np.float32, "float_val"),
    2: (np.float64, "double_val"),
    3: (np.int32, "int_val"),
    4: (np.uint8, "int_val"),
    5: (np.int16, "int_val"),
    6: (np.int8, "int_val"),
    9: (np.int64, "int64_val"),
    10: (np.bool_, "bool_val"),
    19: (np.float16, "half_val"),
}


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the numeric constants of a GraphDef by the names of their nodes.

    Raises:
      ValueError: the file is no GraphDef, or has no constants.
    """
    from google.protobuf import message
    from tensorboardX.proto import graph_pb2

    graph = graph_pb2.GraphDef()
    try:
        graph.ParseFromString(pathlib.Path(path).read_bytes())
    except message.DecodeError:
        raise ValueError("not a TensorFlow graph, or damaged") from None
    tensors = {
        node.name: node.attr["value"].tensor
        for node in graph.node
        if node.op == "Const" and node.attr["value"].tensor.dtype in _TYPES
    }
    if not tensors:
        raise ValueError("a TensorFlow graph without constants, or damaged")
    return {name: _array(name, tensor) for name, tensor in tensors.items()}


def _array(name: str, tensor) -> np.ndarray:
    dtype, field = _TYPES[tensor.dtype]
    shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
    num = math.prod(shape)
    if tensor.tensor_content:
        values = np.frombuffer(tensor.tensor_content, np.dtype(dtype).newbyteorder("<"))
    elif field == "half_val":
        # The bits of each number, as an int32.
        values = np.array(tensor.half_val, np.uint16).view(np.float16)
    else:
        values = np.array(getattr(tensor, field), dtype)
    if len(values) < num and not tensor.tensor_content:
        tail = values[-1:] if len(values) else np.zeros(1, dtype)
        values = np.concatenate([values, np.repeat(tail, num - len(values))])
    if len(values) != num:
        raise ValueError(
            f"damaged: constant '{name}' has {len(values)} of {num} values"
        )
    return values.astype(dtype).reshape(shape)
