"""Files in `data` were written by torch 2.15: `torch.save` of both formats, and a
scripted module.
"""

import io
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from diffusionlab.features import torch_file

DATA = pathlib.Path(__file__).parent / "data"
WHOLE = np.arange(12, dtype=np.float32).reshape(3, 4)
# The files have 'epoch', 'lr', 'done' and 'notes' beside 'state_dict', and 'part',
# 'turned' and 'repeated' are views.
SAVED = {
    "whole": WHOLE,
    "part": WHOLE[1:, 1:3],
    "turned": WHOLE.T,
    "repeated": np.full(3, 2.5, np.float32),
    "half": np.array([0.5, -65504], np.float16),
    "bfloat16": np.array([1.0078125, -3e38], ml_dtypes.bfloat16),
    "double": np.array([1 / 3]),
    "long": np.array(2**40),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": np.array([7, 8], np.float32),
}
STORED = np.arange(4, dtype=np.float32).tobytes()  # of handwritten files


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_both_formats_of_torch_are_read(name):
    found = torch_file.read(DATA / name)
    assert list(found) == list(SAVED)
    for key, expected in SAVED.items():
        assert found[key].dtype == expected.dtype, key
        assert found[key].flags.c_contiguous, key
        np.testing.assert_array_equal(found[key], expected, err_msg=key)


def test_torchscript_modules_are_read_by_dotted_names():
    found = torch_file.read(DATA / "script.pt")
    assert set(found) == {"bias", "inner.weight", "inner.count"}
    np.testing.assert_array_equal(found["inner.weight"], [[0, 1, 2], [3, 4, 5]])
    assert found["inner.count"] == 5


def tensor(offset=0, size=(2,), stride=(1,), storage="FloatStorage"):
    """The pickle of a tensor over a storage '0' of four elements, in ASCII."""
    numbers = "".join(f"I{n}\n" for n in size), "".join(f"I{n}\n" for n in stride)
    return (
        "ctorch._utils\n_rebuild_tensor_v2\n("
        f"(Vstorage\nctorch\n{storage}\nV0\nVcpu\nI4\ntQ"
        f"I{offset}\n({numbers[0]}t({numbers[1]}tI00\nNtR"
    )


def mapping(**entries):
    """The pickle of a dictionary of pickled values."""
    return "(d" + "".join(f"V{key}\n{value}s" for key, value in entries.items())


def call(module, name, *strings):
    """The pickle of a call."""
    return f"c{module}\n{name}\n(" + "".join(f"V{s}\n" for s in strings) + "tR"


def write_zip(path, text, order=None):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", text + ".")
        archive.writestr("archive/data/0", STORED)
        if order:
            archive.writestr("archive/byteorder", order)
    return path


def write_legacy(path, text):
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    out = io.BytesIO()
    for value in head:
        pickle.dump(value, out, protocol=2)
    out.write(text.encode() + b".")
    pickle.dump(["0"], out, protocol=2)
    out.write(struct.pack("<q", 4) + STORED)
    path.write_bytes(out.getvalue())
    return path


WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy])


@WRITERS
def test_handwritten_files_are_read(tmp_path, write):
    """What the malicious ones below differ from."""
    text = mapping(a=tensor(1, (2, 2), (0, 2)), b=tensor(size=(), stride=()))
    found = torch_file.read(write(tmp_path / "a.pth", text))
    np.testing.assert_array_equal(found["a"], [[1, 3], [1, 3]])
    assert found["b"].shape == () and found["b"] == 0


@WRITERS
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("collections", "OrderedDict.fromkeys"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("numpy._core.multiarray", "scalar"),
    ],
)
def test_any_other_name_is_refused_and_not_called(tmp_path, write, module, name):
    target = tmp_path / "made"
    text = mapping(x=tensor(), y=call(module, name, f"touch {target}"))
    path = write(tmp_path / "bad.pth", text)
    with pytest.raises(ValueError, match=f"holds a '{module}.{name}'"):
        torch_file.read(path)
    assert not target.exists()


@WRITERS
@pytest.mark.parametrize(
    "view",
    [
        {"offset": 3},
        {"offset": -1},
        {"stride": (4,)},
        {"stride": (-1,)},
        {"size": (-2,)},
        {"size": (2, 2), "stride": (1,)},
        {"size": (10**9,)},
        {"storage": "DoubleStorage", "size": (3,)},
    ],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path, write, view):
    path = write(tmp_path / "bad.pth", mapping(x=tensor(**view)))
    with pytest.raises(ValueError, match="damaged"):
        torch_file.read(path)


@pytest.mark.parametrize(
    "text",
    [
        mapping(state_dict=mapping(x=tensor()), optimizer=mapping(y=tensor())),
        mapping(model=mapping(x=tensor()), y=tensor()),
        mapping(module=mapping(state_dict=mapping(x=tensor()))),
        f"(dVmodule.x\n{tensor()}s",
    ],
)
def test_state_is_found_inside_a_checkpoint(tmp_path, text):
    assert set(torch_file.read(write_zip(tmp_path / "a.pth", text))) == {"x"}


def test_nested_dictionaries_have_dotted_names(tmp_path):
    text = mapping(trunk=mapping(x=tensor()), head=mapping(y=tensor(), z="I3\n"))
    found = torch_file.read(write_zip(tmp_path / "a.pth", text))
    assert set(found) == {"trunk.x", "head.y"}


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "script.pt"])
def test_truncated_files_are_damaged(tmp_path, name):
    whole = (DATA / name).read_bytes()
    path = tmp_path / name
    for size in (0, 5, len(whole) // 3, len(whole) - 9):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a file of torch|damaged"):
            torch_file.read(path)


def test_a_legacy_file_ends_with_its_last_storage(tmp_path):
    path = write_legacy(tmp_path / "a.pth", mapping(x=tensor()))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="the file ends early"):
        torch_file.read(path)


@pytest.mark.parametrize("content", [b"hello, world\n", b"\x80\x02]q\x00.", b"I1\n."])
def test_foreign_files_are_refused(tmp_path, content):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a file of torch"):
        torch_file.read(path)


def test_what_is_not_a_dictionary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds a tensor where a dictionary"):
        torch_file.read(write_zip(tmp_path / "a.pth", tensor()))


def test_other_byte_order_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.pth", mapping(x=tensor()), order="big")
    with pytest.raises(ValueError, match="not little-endian"):
        torch_file.read(path)
