"""Random changes do what was drawn, and draw a whole global batch."""

import numpy as np
import pytest

from diffusionlab.data import augment, base


@pytest.fixture
def x():
    values = np.arange(2 * 3 * 4 * 2, dtype=np.float32)
    return values.reshape(2, 3, 4, 2)


def test_flip_mirrors_the_drawn_images(x):
    out = augment.Flip()(x, np.asarray([True, False]))
    np.testing.assert_array_equal(out[0], x[0, :, ::-1])
    np.testing.assert_array_equal(out[1], x[1])


def test_flip_draws_with_its_probability():
    rng = base.generator(0, "test")
    assert not augment.Flip(probability=0.0).draw(rng, 100).any()
    assert augment.Flip(probability=1.0).draw(rng, 100).all()
    assert 0.2 < augment.Flip(probability=0.3).draw(rng, 1000).mean() < 0.4


def test_translate_shifts_and_fills(x):
    change = augment.Translate(max_shift=2, fill=-5.0)
    out = change(x, np.asarray([[1, 2], [-1, 0]]))
    np.testing.assert_array_equal(out[0, 1:, 2:], x[0, :-1, :-2])
    assert np.all(out[0, 0] == -5) and np.all(out[0, :, :2] == -5)
    np.testing.assert_array_equal(out[1, :-1], x[1, 1:])
    assert np.all(out[1, -1] == -5)


def test_translate_draws_all_shifts_up_to_the_largest():
    drawn = augment.Translate(max_shift=1).draw(base.generator(0, "test"), 500)
    assert drawn.shape == (500, 2)
    assert {tuple(shift) for shift in drawn} == {
        (row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)
    }


@pytest.mark.parametrize("change", [augment.Flip(), augment.Translate(max_shift=2)])
def test_a_change_keeps_shape_and_type_and_its_input(change, x):
    before = x.copy()
    out = change(x, change.draw(base.generator(0, "test"), len(x)))
    assert out.shape == x.shape and out.dtype == np.float32
    np.testing.assert_array_equal(x, before)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="probability"):
        augment.Flip(probability=2.0)
    with pytest.raises(ValueError, match="max_shift"):
        augment.Translate(max_shift=-1)
