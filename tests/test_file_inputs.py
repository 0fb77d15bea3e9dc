import numpy as np
import pytest
from PIL import Image

from diffusionlab import types
from diffusionlab.data.example_files import ExampleFiles
from diffusionlab.file_inputs import Reference, Samples, open_files
from diffusionlab.types import DataSpec

PIXELS = np.random.default_rng(0).integers(0, 256, (150, 4, 4, 1)).astype(np.uint8)
MOMENTS = dict(mu=np.zeros(2), sigma=np.eye(2))


@pytest.fixture
def write(tmp_path):
    """`write(name, **arrays)`: path of an .npz file."""

    def make(name="x.npz", **arrays):
        np.savez(tmp_path / name, **arrays)
        return str(tmp_path / name)

    return make


def test_data_set_without_a_split_is_both_splits():
    reference = Reference("digits")
    assert (len(reference.train), len(reference.test)) == (1442, 355)
    assert reference.about["source"]["split"] == "train"


def test_data_set_with_a_split_is_that_one():
    reference = Reference("{'name': 'digits', 'split': 'test'}")
    assert reference.train is reference.test and len(reference.train) == 355
    assert reference.about["num"] == 355


def test_file_of_examples_is_the_reference_twice(write):
    reference = Reference(write(x=PIXELS))
    assert reference.train is reference.test and len(reference.test) == 150
    assert not reference.statistics and not reference.note


def test_file_of_statistics_has_no_examples(write):
    path = write(**MOMENTS)
    reference = Reference(path)
    assert reference.statistics == path
    for ask in (len, lambda s: s[0], lambda s: s.spec):
        with pytest.raises(ValueError, match="--reference: .* statistics only"):
            ask(reference.train)
    assert Reference(write(mu=np.ones(2), sigma=np.eye(2))).about != reference.about


def test_file_with_both_is_examples_and_says_so(write):
    reference = Reference(write(arr_0=PIXELS, **MOMENTS))
    assert len(reference.train) == 150 and not reference.statistics
    assert "takes the statistics" in reference.note


@pytest.mark.parametrize(
    "given, said",
    [
        ("none.npz", "--reference: there is no file or folder 'none.npz'. Nor is it"),
        ("digit", "a data set; these are: array_record, digits,"),
        ("{'name': 'digits'", "--reference: expected a block like"),
        ("{'name': 'digit'}", "--reference.name: unknown source 'digit'; did you mean"),
        ("{'name': 'digits', 'split': 'x'}", "--reference.split: expected 'train'"),
        ("{'digits'}", "--reference: expected a block with a 'name'"),
    ],
)
def test_what_is_no_reference_is_one_line(given, said):
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        Reference(given)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_truncated_reference_is_named(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="^--reference: cannot read .*cut short"):
        Reference(str(tmp_path / "x.npz"))


def test_mistakes_in_files_are_said_of_the_flag(write):
    with pytest.raises(ValueError, match="^--samples: the values in .* black may be"):
        open_files(write(x=PIXELS / 255), "--samples")
    with pytest.raises(FileNotFoundError, match="^--samples: there is no file"):
        open_files("none", "--samples")


def joined(batches):
    return tuple(np.concatenate(part) for part in zip(*batches, strict=True))


def test_stream_is_the_file_in_order(write):
    label = np.arange(150) % 3
    source = ExampleFiles(path=write(x=PIXELS, label=label))
    samples = Samples(source, types.DataSpec((4, 4, 1), 3, ("a", "b", "c")))
    assert samples.spec == DataSpec((4, 4, 1), 3, ("a", "b", "c")) and not samples.note
    everything = PIXELS.astype(np.float32) / 127.5 - 1
    for num, start, stop in ((150, 0, 150), (70, 3, 70), (999, 100, 150)):
        x, found = joined(samples.stream(num, start))
        np.testing.assert_array_equal(x, everything[start:stop])
        np.testing.assert_array_equal(found, label[start:stop])
    assert list(samples.stream(150, 150)) == []
    np.testing.assert_array_equal(samples.draw(20)[0], everything[:20])


@pytest.mark.parametrize(
    "folders, reference, expected",
    [
        # By name, though 'dog' comes second in the folder and third in the data.
        (("cat", "dog"), (3, ("ant", "cat", "dog")), [1, 2]),
        (("0", "10"), (11, ()), [0, 10]),
        (("cat", "dog"), (2, ()), [0, 1]),
        (("cat", "part"), (2, ("cat", "dog")), None),
        (("a", "b", "c"), (2, ()), None),
        (("cat", "dog"), (0, ()), None),
        (("cat", "dog"), None, [0, 1]),
    ],
)
def test_classes_are_matched_by_name_where_there_are_names(
    tmp_path, folders, reference, expected
):
    for name in folders:
        (tmp_path / name).mkdir()
        Image.fromarray(PIXELS[0, :, :, 0]).save(tmp_path / name / "1.png")
    given = reference and types.DataSpec((4, 4, 1), *reference)
    samples = Samples(ExampleFiles(path=str(tmp_path)), given)
    _, label = samples.draw(len(folders))
    if expected is None:
        assert samples.spec.num_classes == 0 and label.tolist() == [0] * len(folders)
        theirs = ", ".join(reference[1]) or reference[0] or "none"
        assert f"({', '.join(folders)}) are not those of the" in samples.note
        assert f"reference ({theirs}): the samples count as without" in samples.note
    else:
        assert label.tolist() == expected and not samples.note
        assert samples.spec.num_classes == (reference[0] if reference else 2)


def test_classes_beyond_those_of_the_reference_do_not_count(write):
    source = ExampleFiles(path=write(x=PIXELS, label=np.arange(150) % 4))
    samples = Samples(source, types.DataSpec((4, 4, 1), 3))
    assert samples.spec.num_classes == 0
    assert "the classes of the samples (4) are not those" in samples.note
