"""Samples of tokens as text: files during training, the strip, and the report."""

import types

import numpy as np
import pytest

from diffusionlab import report, strip, texts
from diffusionlab.data.sources import Digits
from diffusionlab.processes.categorical import Categorical
from diffusionlab.schedules import alpha
from diffusionlab.types import DataSpec

LETTERS = types.SimpleNamespace(
    decode=lambda tokens: "".join(chr(97 + token) for token in tokens)
)


def decode(x):
    return texts.of_tokens(LETTERS, x)


def test_tokens_are_text_where_the_source_can_say_them():
    x = np.array([[0, 1], [2, 0]])
    assert texts.of_tokens(LETTERS, x) == ["ab", "ca"]
    assert texts.of_tokens(object(), x) == ["0 1", "2 0"]
    assert texts.of_tokens(LETTERS, x[None]) == ["0 1 2 0"]
    assert texts.shows_text(DataSpec((2,), num_tokens=3))
    assert not texts.shows_text(DataSpec((2,)))


def test_every_block_has_its_index():
    said = texts.blocks(["one\ntwo", "three"], np.array([7, 8]))
    assert said == "[0] 7\none\ntwo\n\n[1] 8\nthree\n"
    assert texts.blocks(["a"]) == "[0]\na\n"


def test_the_strip_has_a_sample_step_by_step(tmp_path):
    x = np.arange(20).reshape(10, 2) % 3
    strip.add_tokens(tmp_path, 0, x, decode)
    said = strip.add_tokens(tmp_path, 1000, x[2:], decode)
    assert said == (tmp_path / "strip.txt").read_text(encoding="utf-8")
    first = said.split("\n\n")[0].splitlines()
    assert [line.split() for line in first] == [
        ["[0]"],
        ["step", "0", "ab"],
        ["step", "1,000", "bc"],
    ]
    assert said.count("[") == 4
    # Gone on from step 500: what came later does not count.
    again = strip.add_tokens(tmp_path, 500, x, decode)
    assert "step 500" in again and "1,000" not in again
    other = strip.add_tokens(tmp_path, 600, np.zeros((3, 5), int), decode)
    assert "aaaaa" in other and "step 500" not in other


def test_a_line_of_the_strip_is_one_line_and_not_long():
    said = texts.over_steps([(5, ["a\nb" * 200])], limit=4)
    assert said == "[0]\n        step 5  a\u21b5ba\n"


def test_the_report_shows_the_newest_text_as_it_is(tmp_path):
    folder = tmp_path / "samples"
    texts.save(folder / "step_00000100.txt", "[0]\nold")
    texts.save(folder / "step_00002000.txt", "[0]\n<script>new & more</script>")
    strip.add_tokens(folder, 2000, np.array([[0, 1]]), decode)
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "<pre>[0]\n&lt;script&gt;new &amp; more&lt;/script&gt;</pre>" in page
    assert "at step 2,000" in page and "old" not in page
    assert "the same noise over training" in page and "step 2,000  ab" in page
    assert not list(folder.glob(".*"))


def test_the_report_cuts_what_is_long(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_MAX_TEXT", 5)
    texts.save(tmp_path / "samples" / "step_00000001.txt", "abcdefg")
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "<pre>abcde\n\u2026</pre>" in page and "abcdef" not in page


@pytest.mark.parametrize("ending", ["\r\n", "\n", "\x00"])
def test_a_file_holds_the_text_as_it_is(tmp_path, ending):
    path = texts.save(tmp_path / "a.txt", f"a{ending}b")
    assert path.read_bytes() == f"a{ending}b".encode()


def test_digits_are_seventeen_levels_and_leave_as_they_came():
    x = Digits().__getitems__(np.arange(200))["x"]
    process = Categorical(spec=Digits().spec, schedule=alpha.Linear(), levels=17)
    tokens = process.encode(x)
    assert tokens.min() == 0 and tokens.max() == 16
    np.testing.assert_array_equal(process.decode(tokens), x)
