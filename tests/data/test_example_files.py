import tracemalloc

import numpy as np
import pytest
from PIL import Image

from diffusionlab.data import example_files
from diffusionlab.data.example_files import ExampleFiles
from diffusionlab.types import DataSpec

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3)).astype(np.uint8)
FLOATS = PIXELS.astype(np.float32) / 127.5 - 1


@pytest.fixture
def write(tmp_path):
    """`write(**arrays)`: path of an .npz file."""

    def make(**arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        return str(tmp_path / "x.npz")

    return make


def refused(path):
    with pytest.raises(ValueError) as raised:
        ExampleFiles(path=path)
    said = str(raised.value)
    assert said.startswith("path: ") and "\n" not in said
    return said


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_pixels_and_floats_are_the_same_examples(write, dtype):
    x = PIXELS if dtype is np.uint8 else FLOATS.astype(dtype)
    source = ExampleFiles(path=write(x=x))
    assert source.spec == DataSpec((4, 5, 3), 0, ()) and len(source) == 6
    batch = source.__getitems__(np.array([3, 1]))
    assert set(batch) == {"x"} and batch["x"].dtype == np.float32
    # Half precision has 11 bits; below 1 its rounding is at most 2^-12.
    np.testing.assert_allclose(batch["x"], FLOATS[[3, 1]], atol=2.0**-12, rtol=0)
    np.testing.assert_array_equal(source[3]["x"], batch["x"][0])


def test_names_of_other_programs_are_known(write, tmp_path):
    label = np.array([0, 2, 1, 1, 0, 2])
    for names in (("x", "label"), ("arr_0", "arr_1")):
        path = write(**dict(zip(names, (PIXELS, label), strict=True)))
        source = ExampleFiles(path=path)
        assert source.spec.num_classes == 3
        assert source.__getitems__([1, 4])["label"].tolist() == [2, 0]
    np.save(tmp_path / "x.npy", PIXELS)
    np.testing.assert_array_equal(
        ExampleFiles(path=str(tmp_path / "x.npy"))[2]["x"], FLOATS[2]
    )


def test_videos_and_points_are_examples_too(write):
    assert ExampleFiles(path=write(x=FLOATS[:, None])).spec.shape == (1, 4, 5, 3)
    points = np.array([[3.0, -8.0], [0.5, 0.25]])
    source = ExampleFiles(path=write(x=points))
    np.testing.assert_array_equal(source.__getitems__([0, 1])["x"], points)


def test_rounding_beyond_one_is_let_through(write):
    x = np.array([1.0009, -1.0009, 0.3], np.float32)[:, None, None, None]
    found = ExampleFiles(path=write(x=x)).__getitems__(np.arange(3))["x"]
    np.testing.assert_array_equal(found, x)


def test_range_says_what_black_and_white_are(write):
    x = (FLOATS + 1) / 2
    source = ExampleFiles(path=write(x=x, range=[0, 1]))
    # Two roundings of numbers up to 1.
    np.testing.assert_allclose(
        source.__getitems__(np.arange(6))["x"], FLOATS, atol=2e-7
    )
    beyond = (1.5 * FLOATS).astype(np.float32)
    source = ExampleFiles(path=write(x=beyond, range=[-1, 1]))
    np.testing.assert_array_equal(source.__getitems__(np.arange(6))["x"], beyond)
    version = source.version
    assert ExampleFiles(path=write(x=beyond, range=[-2, 2])).version != version


@pytest.mark.parametrize(
    "arrays, said",
    [
        (dict(x=FLOATS * 1.1), "floats have to be in [-1, 1]; of pixels in [0, 255]"),
        (dict(x=PIXELS.astype(np.float32)), "lie in [0, 255]"),
        (dict(x=PIXELS / 255), "black may be 0 or -1; write the array range=[0, 1] or"),
        (dict(x=PIXELS / 255 - 1e-6), "lie in [-1e-06, 1], so black may be 0 or -1"),
        (dict(x=PIXELS / 850 - 1e-6), "lie in [-1e-06, 0.3], so black may be 0 or -1"),
        (dict(x=PIXELS / 255 - 0.49), "lie in [-0.49, 0.51], so black may be 0 or -1"),
        (dict(x=PIXELS[:, None] / 255 - 0.1), "lie in [-0.1, 0.9], so black may be"),
        (dict(x=PIXELS // 128), "uint8 and none is above 1, and white is 255; of pix"),
        (dict(x=PIXELS.astype(np.int64)), "is int64; write uint8"),
        (dict(x=np.moveaxis(PIXELS, 3, 1)),
         "channels come second, and last here; write x.transpose(0, 2, 3, 1)"),
        (dict(x=np.moveaxis(PIXELS[:, None].repeat(2, 1), 4, 2)),
         "channels come third, and last here; write x.transpose(0, 1, 3, 4, 2)"),
        (dict(x=PIXELS.repeat(2, 3)[..., :4]), "has 4 channels (shape [6, 4, 5, 4])"),
        (dict(x=PIXELS[..., 0]), "has shape [6, 4, 5], expected [N, H, W, 1 or 3]"),
        (dict(x=PIXELS[:0]), "is empty: its shape is [0, 4, 5, 3]"),
        (dict(x=PIXELS, label=np.zeros(6)), "'label' of"),
        (dict(arr_0=PIXELS, arr_1=np.zeros(5, int)), "'arr_1' of"),
        (dict(x=PIXELS, label=np.array([-1] * 6)), "negative classes"),
        (dict(x=FLOATS, range=[1, -1]), "is [1, -1], expected [black, white]"),
        (dict(x=FLOATS, range=[0.0]), "expected [black, white]"),
        (dict(x=FLOATS, range=1.0), "expected [black, white]"),
        (dict(x=FLOATS, range=["a", "b"]), "expected [black, white]"),
        (dict(x=np.float32(1), label=np.zeros(1, int)), "has shape [], expected"),
        (dict(x=FLOATS, range=[0, np.nan]), "expected [black, white]"),
        (dict(x=PIXELS, range=[0, 1]), "is for floats, and the examples are uint8"),
        (dict(y=PIXELS), "has no array 'x' or 'arr_0'; it has y."),
        (dict(mu=np.ones(2), sigma=np.eye(2)), "which can be a reference only"),
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_one_line(write, arrays, said):
    path = write(**arrays)
    assert said in refused(path) and path in refused(path)


@pytest.mark.parametrize("low, high", [(-0.51, 0.9), (-0.9, 0.49), (-0.4, 0.4)])
def test_images_that_are_dark_enough_or_pale_are_in_the_range_of_floats(
    write, low, high
):
    x = (low + (high - low) * PIXELS / 255).astype(np.float32)
    source = ExampleFiles(path=write(x=x))
    np.testing.assert_array_equal(source.__getitems__(np.arange(6))["x"], x)


def test_range_admits_bright_images(write):
    x = PIXELS / 255 - 1e-6
    source = ExampleFiles(path=write(x=x, range=[-1, 1]))
    np.testing.assert_array_equal(source[0]["x"], x[0].astype(np.float32))


def test_points_may_lie_anywhere(write):
    for points in (np.linspace(0, 1, 6), np.linspace(-1e-6, 1, 6)):
        source = ExampleFiles(path=write(x=points.reshape(3, 2)))
        np.testing.assert_allclose(source[0]["x"], points[:2], atol=1e-7)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_one_pixel_above_1_tells_what_white_is(tmp_path, monkeypatch, save):
    monkeypatch.setattr(example_files, "_FIRST_BYTES", PIXELS[0].nbytes)
    x = PIXELS // 128
    x[4, 3, 4, 2] = 2
    save(tmp_path / "x.npz", x=x)
    found = ExampleFiles(path=str(tmp_path / "x.npz")).__getitems__(np.arange(6))["x"]
    np.testing.assert_allclose(found, x / 127.5 - 1, atol=1e-7)


def test_one_value_is_not_ambiguous(write):
    assert len(ExampleFiles(path=write(x=np.zeros((2, 4, 4, 1))))) == 2


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_values_that_are_not_finite_are_counted(write, monkeypatch, rows):
    monkeypatch.setattr(example_files, "_BLOCK_BYTES", rows * FLOATS[0].nbytes)
    x = FLOATS.copy()
    x[2, 0, 0, 0], x[2, 1, 0, 0], x[5, 3, 4, 2] = np.nan, np.nan, -np.inf
    said = refused(write(x=x))
    assert "2 of the 6 examples" in said and "the first is example 2;" in said


def test_truncated_file_is_named(write):
    path = write(x=PIXELS)
    with open(path, "r+b") as file:
        file.truncate(300)
    assert "cut short" in refused(path)


def test_path_that_is_not_there_or_no_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder '.*none.npz'"):
        ExampleFiles(path=str(tmp_path / "none.npz"))
    (tmp_path / "x.txt").write_text("1")
    assert "is no .npz or .npy file and no folder" in refused(str(tmp_path / "x.txt"))
    with pytest.raises(FileNotFoundError, match="has no images"):
        ExampleFiles(path=str(tmp_path))


def test_version_changes_with_the_contents_alone(write, tmp_path):
    first = ExampleFiles(path=write(x=PIXELS))
    (tmp_path / "x.npz").rename(tmp_path / "moved.npz")
    assert ExampleFiles(path=str(tmp_path / "moved.npz")).version == first.version
    assert ExampleFiles(path=write(x=PIXELS[::-1])).version != first.version
    labelled = write(x=PIXELS, label=np.zeros(6, int))
    assert ExampleFiles(path=labelled).version != first.version


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_large_file_is_never_in_memory_whole(tmp_path, save):
    x = np.full((4000, 32, 32, 3), 2, np.uint8)  # 12 MB
    save(tmp_path / "x.npz", x=x)
    tracemalloc.start()
    source = ExampleFiles(path=str(tmp_path / "x.npz"))
    source.__getitems__(np.arange(3990, 4000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes / 10


def image(path, x, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.asarray(x)
    Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x).save(path, **options)


def test_images_of_a_folder_come_in_the_order_of_their_paths(tmp_path):
    for i, name in enumerate(("b/2.png", "a/x/1.png", "b/1.png", "a/2.bmp")):
        image(tmp_path / name, PIXELS[i])
    (tmp_path / "a" / "notes.txt").write_text("")
    image(tmp_path / ".hidden" / "0.png", PIXELS[5])
    source = ExampleFiles(path=str(tmp_path))
    assert source.spec == DataSpec((4, 5, 3), 2, ("a", "b")) and len(source) == 4
    batch = source.__getitems__(np.arange(4))
    np.testing.assert_array_equal(batch["x"], FLOATS[[3, 1, 2, 0]])
    assert batch["label"].tolist() == [0, 0, 1, 1]
    version = source.version
    image(tmp_path / "a" / "2.bmp", PIXELS[:1, :, :, 0].repeat(3, 0)[..., None][0])
    assert ExampleFiles(path=str(tmp_path)).version != version


def test_folder_without_sub_folders_or_with_one_has_no_classes(tmp_path):
    image(tmp_path / "one" / "1.png", PIXELS[0])
    assert ExampleFiles(path=str(tmp_path)).spec.num_classes == 0
    image(tmp_path / "2.png", PIXELS[0])
    assert ExampleFiles(path=str(tmp_path)).spec.num_classes == 0


def test_images_are_grey_where_all_of_them_are(tmp_path):
    image(tmp_path / "1.png", PIXELS[0, :, :, :1])
    source = ExampleFiles(path=str(tmp_path))
    np.testing.assert_array_equal(source[0]["x"], FLOATS[0, :, :, :1])
    image(tmp_path / "2.png", PIXELS[1])
    source = ExampleFiles(path=str(tmp_path))
    assert source.spec.shape == (4, 5, 3)
    np.testing.assert_array_equal(source[0]["x"], FLOATS[0, :, :, :1].repeat(3, 2))


def test_image_of_another_size_is_named_with_both(tmp_path):
    image(tmp_path / "1.png", PIXELS[0])
    image(tmp_path / "2.png", PIXELS[0].transpose(1, 0, 2))
    said = refused(str(tmp_path))
    assert "2.png has 4 x 5 pixels" in said and "1.png 5 x 4" in said


def test_image_that_is_neither_grey_nor_rgb_is_named(tmp_path):
    image(tmp_path / "1.png", PIXELS.repeat(2, 3)[0, :, :, :4])
    assert "1.png is an image of the kind RGBA" in refused(str(tmp_path))
    image(tmp_path / "1.png", PIXELS[0, :, :, :1].astype(np.uint16) * 256)
    assert "1.png is an image of the kind I;16" in refused(str(tmp_path))


def test_damaged_image_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    image(tmp_path / "1.png", noise)
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[:200])
    with pytest.raises(ValueError, match=r"cannot read the image .*1\.png"):
        ExampleFiles(path=str(tmp_path))[0]
