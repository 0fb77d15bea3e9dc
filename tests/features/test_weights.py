import hashlib
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
from tensorboardX.proto import graph_pb2

from diffusionlab.features import weights

DATA = pathlib.Path(__file__).parent / "data"
ORIGIN = "It comes from nowhere."
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def write_graph(path):
    graph = graph_pb2.GraphDef()
    tensor = graph.node.add(name="x", op="Const").attr["value"].tensor
    tensor.dtype = 1
    for size in X.shape:
        tensor.tensor_shape.dim.add(size=size)
    tensor.tensor_content = X.tobytes()
    path.write_bytes(graph.SerializeToString())


WRITE = {
    ".npz": lambda path: np.savez(path, x=X),
    ".safetensors": lambda path: safetensors_numpy.save_file({"x": X}, path),
    ".pb": write_graph,
}


@pytest.mark.parametrize("suffix", WRITE)
def test_every_format_gives_arrays_and_the_hash_of_the_file(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    WRITE[suffix](path)
    arrays, digest = weights.read(str(path))
    assert set(arrays) == {"x"} and arrays["x"].dtype == np.float32
    np.testing.assert_array_equal(arrays["x"], X)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_torch_files_are_read_under_all_their_endings(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    shutil.copy(DATA / "legacy.pth", path)
    arrays, _ = weights.read(str(path))
    assert arrays["whole"].shape == (3, 4) and arrays["half"].dtype == np.float16
    assert arrays["bfloat16"].dtype == np.float32


def test_bfloat16_comes_as_float32(tmp_path):
    path = tmp_path / "weights.safetensors"
    x = np.array([1.0078125, -2.0], ml_dtypes.bfloat16)
    safetensors_numpy.save_file({"x": x}, path)
    found = weights.read(str(path))[0]["x"]
    assert found.dtype == np.float32 and found.tolist() == [1.0078125, -2.0]


def one_line(error, call, *args, **keywords):
    with pytest.raises(error) as caught:
        call(*args, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("call", [weights.check_file, weights.read])
def test_missing_files_say_where_they_come_from(tmp_path, call):
    message = one_line(ValueError, call, "", "trunk", ORIGIN)
    assert message == f"trunk: name a local file of weights. {ORIGIN}"
    for path in (tmp_path / "no.pth", tmp_path):
        message = one_line(FileNotFoundError, call, str(path), "trunk", ORIGIN)
        assert message == f"trunk: there is no file {path}. {ORIGIN}"
    path = tmp_path / "weights.h5"
    path.touch()
    message = one_line(ValueError, call, str(path), "trunk", ORIGIN)
    assert message.startswith(f"trunk: {path} does not end in one of .safetensors, ")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pb", ".pth", ".pt"])
def test_damaged_and_foreign_files_are_one_line(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    if suffix in WRITE:
        WRITE[suffix](path)
    else:
        shutil.copy(DATA / "zip.pth", path)
    whole = path.read_bytes()
    array = tmp_path / "one.npy"
    np.save(array, X)
    for content in (whole[: len(whole) * 2 // 3], b"", b"hello", array.read_bytes()):
        path.write_bytes(content)
        message = one_line(ValueError, weights.read, str(path))
        assert message.startswith(f"path: {path} cannot be read: ")


def test_pickled_arrays_are_refused(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    assert "plain arrays" in one_line(ValueError, weights.read, str(path))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, x=X)
    return path


@pytest.fixture
def convert(source, tmp_path):
    """`convert(version)`, which counts its conversions in `.calls`."""

    def double(arrays):
        call.calls += 1
        return {"block/y": 2 * arrays["x"]}

    def call(version="double-1"):
        folder = tmp_path / "cache" / "weights"
        return weights.converted(str(source), "path", double, version, folder)

    call.calls = 0
    return call


def test_a_file_is_converted_once(convert, source, tmp_path):
    for _ in range(2):
        params, digest = convert()
        np.testing.assert_array_equal(params["block/y"], 2 * X)
        assert digest == weights.sha256(str(source))
    assert convert.calls == 1
    kept = list((tmp_path / "cache" / "weights").iterdir())
    assert [path.name for path in kept] == [f"{digest}-double-1.npz"]
    convert("double-2")
    assert convert.calls == 2


def test_a_changed_file_is_converted_again(convert, source):
    _, before = convert()
    np.savez(source, x=X + 1)
    params, after = convert()
    np.testing.assert_array_equal(params["block/y"], 2 * X + 2)
    assert before != after and convert.calls == 2


@pytest.mark.parametrize("damage", [lambda b: b[:40], lambda b: b"", None])
def test_a_damaged_cache_is_made_anew(convert, tmp_path, damage):
    _, digest = convert()
    kept = tmp_path / "cache" / "weights" / f"{digest}-double-1.npz"
    whole = kept.read_bytes()
    place = whole.index((2 * X).tobytes())
    flipped = whole[:place] + b"\xff" + whole[place + 1 :]
    kept.write_bytes(damage(whole) if damage else flipped)
    params, _ = convert()
    np.testing.assert_array_equal(params["block/y"], 2 * X)
    assert convert.calls == 2
    convert()
    assert convert.calls == 2


def test_foreign_weights_are_one_line_and_leave_nothing(source, tmp_path):
    cache = tmp_path / "cache"

    def missing(arrays):
        return {"y": arrays["conv.weight"]}

    def wrong(arrays):
        raise ValueError("the kernel is 3 wide.")

    args = ("v", cache, ORIGIN)
    message = one_line(
        ValueError, weights.converted, str(source), "path", missing, *args
    )
    start = f"path: {source} has no weights of this network: "
    assert message.startswith(f"{start}there is no array 'conv.weight'")
    assert message.endswith(ORIGIN)
    message = one_line(ValueError, weights.converted, str(source), "path", wrong, *args)
    assert message == f"{start}the kernel is 3 wide. {ORIGIN}"
    assert not cache.exists()


def test_an_interrupted_write_leaves_nothing(convert, tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(weights.np, "savez", full)
    with pytest.raises(OSError, match="disk full"):
        convert()
    assert not list((tmp_path / "cache" / "weights").iterdir())
