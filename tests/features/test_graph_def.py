import numpy as np
import pytest
from tensorboardX.proto import graph_pb2

from diffusionlab.features import graph_def

FLOAT, DOUBLE, INT, STRING, BOOL, HALF = 1, 2, 3, 7, 10, 19


def add(graph, name, dtype, shape, op="Const", content=b"", **values):
    node = graph.node.add(name=name, op=op)
    tensor = node.attr["value"].tensor
    tensor.dtype = dtype
    for size in shape:
        tensor.tensor_shape.dim.add(size=size)
    tensor.tensor_content = content
    for field, entries in values.items():
        getattr(tensor, field).extend(entries)


def write(path, graph):
    path.write_bytes(graph.SerializeToString())
    return path


def test_constants_are_read_however_they_are_stored(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    graph = graph_pb2.GraphDef()
    graph.node.add(name="input", op="Placeholder")
    add(graph, "bytes", FLOAT, (2, 3), content=x.tobytes())
    add(graph, "listed", DOUBLE, (2,), double_val=[0.1, 0.2])
    add(graph, "filled", INT, (2, 2), int_val=[7])
    add(graph, "tail", FLOAT, (4,), float_val=[1, 2])
    add(graph, "scalar", BOOL, (), bool_val=[True])
    add(graph, "half", HALF, (2,), half_val=[0x3C00, 0xC000])
    add(graph, "zeros", FLOAT, (2,))
    add(graph, "text", STRING, (1,), string_val=[b"label"])
    add(graph, "variable", FLOAT, (1,), op="VariableV2", float_val=[1])
    found = graph_def.read(write(tmp_path / "graph.pb", graph))
    expected = {
        "bytes": x,
        "listed": np.array([0.1, 0.2]),
        "filled": np.full((2, 2), 7, np.int32),
        "tail": np.array([1, 2, 2, 2], np.float32),
        "scalar": np.array(True),
        "half": np.array([1, -2], np.float16),
        "zeros": np.zeros(2, np.float32),
    }
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert found[name].shape == array.shape, name


def test_damaged_graphs_are_refused(tmp_path):
    graph = graph_pb2.GraphDef()
    add(graph, "x", FLOAT, (2, 3), content=np.ones(6, np.float32).tobytes())
    whole = graph.SerializeToString()
    path = tmp_path / "graph.pb"
    for content in (whole[:-5], b"", b"hello, world\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            graph_def.read(path)


@pytest.mark.parametrize(
    "values", [{"content": b"1234"}, {"float_val": [1, 2, 3, 4, 5, 6, 7]}]
)
def test_constants_have_as_many_values_as_their_shape(tmp_path, values):
    graph = graph_pb2.GraphDef()
    add(graph, "x", FLOAT, (2, 3), **values)
    path = write(tmp_path / "graph.pb", graph)
    with pytest.raises(ValueError, match="constant 'x' has . of 6 values"):
        graph_def.read(path)
