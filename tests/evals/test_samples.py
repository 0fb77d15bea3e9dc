import numpy as np
import pytest
from sklearn import datasets

from diffusionlab import types
from diffusionlab.evals import samples

SPEC = types.DataSpec((8, 8, 1), 10, tuple(f"class {c}" for c in range(10)))


class Digits:
    spec = SPEC

    def __init__(self, rows):
        x, label = datasets.load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(x))[rows]
        self.x = (x[order] / 8 - 1).reshape(-1, 8, 8, 1).astype(np.float32)
        self.label = label[order].astype(np.int32)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "label": self.label[index]}


TRAIN, TEST = Digits(slice(None, 1437)), Digits(slice(1437, None))


def context(draw, spec=SPEC):
    return types.EvalContext(
        step=1,
        spec=spec,
        train=TRAIN,
        test=TEST,
        draw=draw,
        loss=None,
        predict=None,
        compute=None,
        process=None,
        sampler=None,
    )


def of_class(source, num_samples, noise=0.0, turn=0):
    """Real digits in the place of samples, label i asked for at place i mod 10."""
    rng = np.random.default_rng(0)
    label = np.arange(num_samples) % 10
    rows = [rng.choice(np.flatnonzero(source.label == (c + turn) % 10)) for c in label]
    x = source.x[rows] + noise * rng.normal(size=(num_samples, 8, 8, 1))
    return x.astype(np.float32), label.astype(np.int32)


def test_real_held_out_digits_pass_for_good_samples():
    result = samples.Samples(num_samples=300)(context(lambda n: of_class(TEST, n)))
    numbers = result.numbers
    assert numbers["agreement_real"] >= 0.97
    assert numbers["agreement"] >= 0.97
    assert numbers["precision"] == 1, "they are the held-out digits themselves"
    assert numbers["precision_real"] > 0.9 and numbers["recall_real"] > 0.8
    assert numbers["nearest_train_ratio"] == pytest.approx(1, abs=0.1)
    assert numbers["too_close"] < 0.06
    assert numbers["accuracy/class 3"] > 0.9
    assert set(result.pictures) == {"classes", "neighbours"}


def test_copies_of_training_digits_are_found_out():
    draw = lambda n: of_class(TRAIN, n)  # noqa: E731
    numbers = samples.Samples(num_samples=100)(context(draw)).numbers
    assert numbers["nearest_train"] == 0
    assert numbers["nearest_train_ratio"] == 0
    assert numbers["too_close"] == 1


def test_digits_of_another_class_do_not_agree():
    draw = lambda n: of_class(TEST, n, turn=1)  # noqa: E731
    assert samples.Samples(num_samples=100)(context(draw)).numbers["agreement"] < 0.05


def test_noise_is_not_precise():
    draw = lambda n: of_class(TEST, n, noise=1.0)  # noqa: E731
    assert samples.Samples(num_samples=100)(context(draw)).numbers["precision"] < 0.2


def test_without_classes_there_is_no_classifier():
    spec = types.DataSpec((8, 8, 1))
    draw = lambda n: of_class(TEST, n)  # noqa: E731
    result = samples.Samples(num_samples=50)(context(draw, spec))
    assert "agreement" not in result.numbers and "recall" in result.numbers
    assert set(result.pictures) == {"samples", "neighbours"}


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="more than k"):
        samples.Samples(num_samples=5)
