import numpy as np
import pytest
from PIL import Image

from diffusionlab import pictures


def test_range_maps_to_black_and_white_and_is_clipped():
    x = np.array([-3.0, -1.0, 0.0, 1.0, np.nan]).reshape(5, 1, 1, 1)
    gray = pictures.to_uint8(x)
    assert gray.shape == (5, 1, 1, 3)
    assert gray[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 0]


def test_grid_places_images_row_by_row():
    x = np.linspace(-1, 1, 5)[:, None, None, None] * np.ones((5, 2, 3, 1))
    picture = pictures.grid(x, 2, scale=1, gap=1)
    assert picture.shape == (3 * 3 + 1, 2 * 4 + 1, 3)
    assert picture.dtype == np.uint8
    assert picture[1, 1].tolist() == [0, 0, 0]
    assert picture[4, 5].tolist() == [191, 191, 191]
    assert picture[7, 5].tolist() == [255, 255, 255], "an empty place is white"


def test_small_images_are_enlarged_without_blur():
    x = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3))
    picture = pictures.grid(x, 1, gap=0)
    assert picture.shape == (40, 40, 3)
    assert np.array_equal(picture[::5, ::5], pictures.to_uint8(x)[0])


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"shape \(2, 8, 8\)"):
        pictures.grid(np.zeros((2, 8, 8)), 1)
    with pytest.raises(ValueError, match="columns"):
        pictures.grid(np.zeros((2, 8, 8, 1)), 0)
    with pytest.raises(ValueError, match="2, 1, 2"):
        row = np.zeros((1, 8, 8, 1))
        pictures.labelled_grid([row, row], [row], ["a", "b"])
    with pytest.raises(ValueError, match="expected points"):
        pictures.scatter([("x", np.zeros((4, 3)), np.zeros(4, int))])


def test_labelled_grid_has_a_row_per_class_and_real_images_at_the_right():
    black, white = -np.ones((3, 8, 8, 1)), np.ones((2, 8, 8, 1))
    picture = pictures.labelled_grid(
        [black, black[:0]], [white, -white], ["zero", "one"], scale=5
    )
    right = picture[-20, -20]
    assert right.tolist() == [0, 0, 0], "real images of the last class"
    assert picture[50, -20].tolist() == [255, 255, 255]
    assert picture[:28].min() < 255, "captions are written"


def test_pairs_stand_side_by_side():
    left, right = -np.ones((2, 4, 4, 1)), np.ones((2, 4, 4, 1))
    picture = pictures.pairs(left, right, 2, scale=1)
    assert picture[8:12, 8:12].max() == 0
    assert picture[8:12, 12:16].min() == 255


def test_scatter_draws_every_panel():
    points = np.random.default_rng(0).normal(size=(50, 2))
    picture = pictures.scatter(
        [("a", points, np.arange(50)), ("b", points, points[:, 0] > 0)]
    )
    assert picture.dtype == np.uint8
    assert picture.shape == (360, 720, 3)
    coloured = np.ptp(picture.astype(int), axis=-1) > 50
    assert coloured[:, :360].any() and coloured[:, 360:].any()


def test_curves_are_drawn_in_different_colours_with_a_level():
    lines = [(f"line {i}", [2, 8, 32], [1.0, 0.5, 0.1 * (i + 1)]) for i in range(12)]
    titles = {"x_title": "x", "y_title": "y"}
    picture = pictures.curves(lines, levels=[("real", 0.05), ("best", 0.3)], **titles)
    assert picture.dtype == np.uint8 and picture.shape[1:] == (1000, 3)
    bright = picture[np.ptp(picture.astype(int), axis=-1) > 100]
    assert len(np.unique(bright // 32, axis=0)) >= 10
    empty = pictures.curves([("none", [2], [0.0])], **titles)
    assert empty.shape[1] == 1000 and empty.min() == 255
    longer = pictures.curves(lines * 3, **titles)
    assert longer.shape[0] > picture.shape[0], "the legend has room"


def test_captioned_columns_have_a_row_per_example():
    black, white = -np.ones((3, 4, 4, 1)), np.ones((3, 4, 4, 1))
    picture = pictures.captioned_columns([("a", black), ("b", white)], scale=2)
    assert picture.shape == (24 + 3 * 12 + 4, 2 * 12 + 4, 3)
    assert picture[24 + 4 :, 4:12].min() == 0 and picture[30, 18].min() == 255
    assert picture[:24].min() < 255, "captions are written"
    with pytest.raises(ValueError, match="shapes differ"):
        pictures.captioned_columns([("a", black), ("b", white[:2])])


def test_only_arrays_of_one_or_three_channels_are_images():
    shapes = [(8, 8, 1), (8, 8, 3), (8, 8, 2), (8,), (4, 8, 8, 3)]
    assert [pictures.shows_images(s) for s in shapes] == [1, 1, 0, 0, 0]


def test_png_round_trip_leaves_no_other_file(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = pictures.save_png(tmp_path / "new" / "a.png", picture)
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    with pytest.raises(TypeError, match="uint8"):
        pictures.save_png(path, picture / 255)
