import numpy as np
from PIL import Image

from diffusionlab import main, report, strip, train


def images(value, number=20, side=8):
    return np.full((number, side, side, 1), value, np.float32)


def rows_of(folder):
    with np.load(folder / "strip.npz") as stored:
        return {int(name): stored[name] for name in stored.files}


def test_each_step_is_a_row_and_the_newest_is_last(tmp_path):
    strip.add(tmp_path, 0, images(-1.0))
    one = np.asarray(Image.open(tmp_path / "strip.png"))
    picture = strip.add(tmp_path, 1000, images(1.0))
    assert np.array_equal(picture, np.asarray(Image.open(tmp_path / "strip.png")))
    # Rows of 40 pixels, a gap of 2 between and around.
    assert (one.shape[0], picture.shape[0]) == (44, 86)
    right = picture[:, -30].mean(axis=-1)
    assert right[10:40].max() == 0 and right[46:80].min() == 255
    assert picture[:, :50].min() < 100, "the steps are written at the left"
    assert {part.shape for part in rows_of(tmp_path).values()} == {(12, 8, 8, 3)}


def test_a_resumed_run_replaces_what_it_makes_again_and_loses_nothing(tmp_path):
    for step, value in ((0, -1.0), (5, -0.5), (10, 0.0), (15, 0.5)):
        strip.add(tmp_path, step, images(value))
    strip.add(tmp_path, 10, images(1.0))
    found = rows_of(tmp_path)
    assert sorted(found) == [0, 5, 10], "step 15 was of a training that is gone"
    assert [int(found[s].mean()) for s in (0, 5, 10)] == [0, 64, 255]
    strip.add(tmp_path, 15, images(1.0))
    assert sorted(rows_of(tmp_path)) == [0, 5, 10, 15]


def test_large_images_are_averaged_down(tmp_path):
    checks = np.indices((200, 200)).sum(axis=0) % 2 * 2.0 - 1
    strip.add(tmp_path, 1, np.tile(checks[None, :, :, None], (3, 1, 1, 3)))
    (row,) = rows_of(tmp_path).values()
    assert row.shape == (3, 50, 50, 3)
    assert row.min() == row.max() == 128


def test_latents_are_shown_by_some_of_their_channels(tmp_path):
    strip.add(tmp_path, 1, np.zeros((3, 8, 8, 4)))
    assert rows_of(tmp_path)[1].shape == (3, 8, 8, 3)


def test_points_are_a_small_panel_a_step(tmp_path):
    x, label = np.random.default_rng(0).normal(size=(900, 2)), np.arange(900) % 8
    for step in range(8):
        picture = strip.add(tmp_path, step, x / (step + 1), label)
    assert picture.shape == (360, 6 * 180, 3), "two rows of at most six panels"
    assert rows_of(tmp_path)[7].shape == (400, 2)
    coloured = np.ptp(picture.astype(int), axis=-1) > 50
    assert coloured[180:, 180:360].any(), "the eighth"
    assert not coloured[180:, 400:].any(), "and no ninth"


def test_of_many_steps_an_even_choice_is_drawn(tmp_path):
    rows = {step: np.zeros((2, 8, 8, 3), np.uint8) for step in range(0, 1000, 5)}
    rows[995] += 255
    picture = strip.draw(rows)
    assert picture.shape[0] == 40 * 42 + 2
    assert picture[:-42, -20].min() == 0 and picture[-30, -20].tolist() == [255] * 3


def test_what_cannot_be_read_or_does_not_fit_is_left_out(tmp_path):
    (tmp_path / "strip.npz").write_bytes(b"PK\x03\x04 half a file")
    strip.add(tmp_path, 5, images(0.0))
    strip.add(tmp_path, 10, images(0.0, number=4))
    assert sorted(rows_of(tmp_path)) == [5, 10]
    strip.add(tmp_path, 15, images(0.0, side=16))
    assert sorted(rows_of(tmp_path)) == [15]


def test_every_run_has_a_strip_that_a_restart_continues(root, tmp_path):
    def run(folder, num_steps):
        words = [f"--config={root}/configs/mixture/denoising.py:smoke"]
        words += [f"--workdir={folder}", f"--config.train.num_steps={num_steps}"]
        words += ["--config.evals={}", "--config.logging.tensorboard=False"]
        assert main.run(words) == train.DONE
        return rows_of(folder / "samples")

    assert sorted(run(tmp_path / "broken", 5)) == [5]
    broken, whole = run(tmp_path / "broken", 10), run(tmp_path / "whole", 10)
    assert sorted(broken) == sorted(whole) == [5, 10]
    assert all(np.array_equal(broken[step], whole[step]) for step in whole)
    assert not np.array_equal(whole[5], whole[10])
    page = report.write_report(tmp_path / "whole").read_text()
    assert page.count("the same noise and labels over training</figcaption>") == 1
    (tmp_path / "whole" / "samples" / "step_00000005.png").unlink()
    page = report.write_report(tmp_path / "whole").read_text()
    assert "the same noise" not in page, "of one step the grid shows more"
