import io
import zipfile

import numpy as np
import pytest

from diffusionlab.data import array_files

X = np.arange(2 * 3 * 4, dtype=np.float32).reshape(6, 2, 2) / 7


@pytest.fixture(params=["npy", "stored", "compressed", "fortran", "packed fortran"])
def file(request, tmp_path):
    """(path, name) of X, written in one of the ways numpy has."""
    x = np.asfortranarray(X) if "fortran" in request.param else X
    if request.param == "npy":
        np.save(tmp_path / "x.npy", x)
        return tmp_path / "x.npy", ""
    packed = request.param in ("compressed", "packed fortran")
    path = tmp_path / "x.npz"
    (np.savez_compressed if packed else np.savez)(path, a=np.ones(5), x=x)
    return path, "x"


def test_rows_are_those_that_were_written(file):
    x = array_files.open_array(*file)
    assert x.shape == X.shape and x.dtype == X.dtype and len(x) == 6
    for which in (slice(1, 4), np.array([5, 0, 3, 3]), [2], 4, slice(None)):
        np.testing.assert_array_equal(x[which], X[which])


def test_what_is_stored_is_mapped_and_what_is_packed_is_not_read_whole(tmp_path):
    np.savez(tmp_path / "a.npz", x=X)
    assert isinstance(array_files.open_array(tmp_path / "a.npz", "x"), np.memmap)
    np.savez_compressed(tmp_path / "b.npz", x=X)
    assert not isinstance(array_files.open_array(tmp_path / "b.npz", "x"), np.ndarray)


def test_local_header_that_is_padded_is_skipped(tmp_path):
    """Writers align members by extra bytes that the directory does not mention."""
    content = io.BytesIO()
    np.save(content, X)
    info = zipfile.ZipInfo("x.npy")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        info.extra = b"\x35\x10\x06\x00" + bytes(6)
        archive.writestr(info, content.getvalue())
        info.extra = b""
    x = array_files.open_array(tmp_path / "x.npz", "x")
    assert isinstance(x, np.memmap)
    np.testing.assert_array_equal(x, X)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_members_tell_a_changed_array_from_the_same(tmp_path, save):
    versions = []
    for i, x in enumerate((X, X, X + 1)):
        save(tmp_path / f"{i}.npz", x=x)
        versions.append(array_files.members(tmp_path / f"{i}.npz"))
    assert versions[0] == versions[1] != versions[2]
    assert list(versions[0]) == ["x"]


@pytest.mark.parametrize("kept", [0, 20, 0.5, -5])
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_file_that_is_cut_short_is_one_line(tmp_path, kept, suffix):
    path = tmp_path / f"x{suffix}"
    (np.savez(path, x=X) if suffix == ".npz" else np.save(path, X))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else kept])
    with pytest.raises(ValueError, match="cannot read .*cut short") as raised:
        array_files.members(path)
        array_files.open_array(path, "" if suffix == ".npy" else "x")
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("packed", [False, True])
def test_member_with_fewer_numbers_than_it_says_is_refused(tmp_path, packed):
    content = io.BytesIO()
    np.save(content, X)
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "x.npz", "w", kind) as archive:
        archive.writestr("x.npy", content.getvalue()[:-4])
    with pytest.raises(ValueError, match="cannot read"):
        array_files.open_array(tmp_path / "x.npz", "x")


def test_damaged_bytes_of_a_packed_member_are_one_line(tmp_path):
    path = tmp_path / "x.npz"
    noise = np.random.default_rng(0).integers(0, 256, (50, 1000)).astype(np.uint8)
    np.savez_compressed(path, x=noise % 17)
    content = bytearray(path.read_bytes())
    content[20_000:20_100] = bytes(100)
    path.write_bytes(content)
    x = array_files.open_array(path, "x")
    with pytest.raises(ValueError, match=f"cannot read {path}"):
        x[:]


def test_python_objects_are_never_loaded(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.array([{}, None]))
    with pytest.raises(ValueError, match="Python objects"):
        array_files.open_array(tmp_path / "x.npz", "x")
