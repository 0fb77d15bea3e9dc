"""Text: what is in which window of which split, and tokens to text and back."""

import dataclasses
import sys

import numpy as np
import pytest

from diffusionlab import registry
from diffusionlab.data import text, tokenizers
from diffusionlab.data.text import Text

HUNDRED = "".join(chr(ord("a") + i % 26) for i in range(100))


@pytest.fixture
def write(tmp_path):
    """`write(name=content)`: files of a folder, and its path."""

    def make(**files):
        for name, content in files.items():
            file = tmp_path / name.replace("__", "/")
            file.parent.mkdir(exist_ok=True)
            if isinstance(content, str):
                content = content.encode()
            file.with_suffix(".txt").write_bytes(content)
        return str(tmp_path)

    return make


def test_pydoc_is_the_text_that_the_specification_counted():
    train, test = (Text(corpus="pydoc", split=split) for split in ("train", "test"))
    whole = np.concatenate([train.tokens, test.tokens])
    if sys.version_info[:3] == (3, 11, 7):
        assert (len(whole), train.spec.num_tokens) == (465_048, 103)
    assert len(test.tokens) == round(0.1 * len(whole))
    assert train.decode(train.tokens[:26]) == 'The "assert" statement\n***'
    assert whole.max() == train.spec.num_tokens - 1 and whole.dtype == np.uint8


def test_windows_of_training_overlap_and_held_out_ones_do_not(write):
    make = {"path": write(a=HUNDRED), "length": 8, "stride": 3}
    train, test = Text(**make), Text(**make, split="test", test_fraction=0.2)
    # 90 tokens: starts 0, 3, ..., 81; and 20 tokens: starts 0 and 8.
    assert (len(train), len(test)) == (28, 2)
    assert train.decode(train[27]["x"]) == HUNDRED[81:89]
    assert test.decode(test[1]["x"]) == HUNDRED[88:96]
    batch = train.__getitems__([0, 5])["x"]
    assert batch.dtype == np.int32 and batch.shape == (2, 8)
    assert train.decode(batch[1]) == HUNDRED[15:23]
    assert train.spec.shape == (8,) and train.spec.num_tokens == 26
    assert len(dataclasses.replace(train, stride=1)) == 90 - 8 + 1
    assert len(dataclasses.replace(train, length=90, stride=1)) == 1
    with pytest.raises(IndexError, match="expected 0 to 27, got"):
        train[28]
    with pytest.raises(IndexError):
        train[-1]


def test_a_folder_is_its_documents_in_order_with_separators_between(write, tmp_path):
    folder = write(b="two", a="one!", c__d="three" * 8)
    (tmp_path / ".x").mkdir()
    (tmp_path / ".x" / "e.txt").write_text("hidden")
    (tmp_path / "f.md").write_text("other")
    source = Text(path=folder, length=4, separator="|")
    assert source.decode(source.tokens[:12]) == "one!|two|thr"
    other = Text(path=folder, length=2, suffix=".md", test_fraction=0.4)
    assert other.decode(other.tokens) == "oth"
    as_bytes = dataclasses.replace(source, tokenizer="bytes")
    assert as_bytes.tokens[:12].tobytes() == b"one!|two|thr"
    assert as_bytes.spec.num_tokens == 256


def test_a_file_that_changes_is_read_again(write):
    path = write(a="abcd" * 10) + "/a.txt"
    before = Text(path=path, length=4)
    write(a="bcda" * 11)
    after = Text(path=path, length=4)
    assert before.decode(before[0]["x"]) == "abcd"
    assert after.decode(after[0]["x"]) == "bcda"
    assert before.version != after.version and before.vocabulary == after.vocabulary
    assert after.version == dataclasses.replace(after).version


def test_characters_that_only_the_held_out_text_has_are_one_unknown_symbol(write):
    source = Text(path=write(a="ab" * 9 + "a\u20ac"), length=2)
    assert source.spec.num_tokens == 3
    test = dataclasses.replace(source, split="test")
    assert test.tokens.tolist() == [0, 2] and test.decode(test.tokens) == "a\ufffd"
    assert source.encode("b?").tolist() == [1, 2]
    known = Text(path=write(a="ab" * 10), length=2)
    with pytest.raises(ValueError, match=r"text: the character '\?' is none of the 2"):
        known.encode("ab?")
    assert known.encode("").shape == (0,) and known.decode(known.encode("ba")) == "ba"


@pytest.mark.parametrize("word", ["characters", "bytes"])
def test_decode_turns_encode_around(word, write, monkeypatch):
    # Zero, beyond 16 bits, and more than what is looked up at a time.
    monkeypatch.setattr(tokenizers, "_CHUNK", 7)
    content = "na\u00efve \x00\n\u20ac \U0001f600 " * 20
    source = Text(path=write(a=content), length=8, tokenizer=word)
    tokens = source.encode(content)
    assert source.decode(tokens) == content and tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens[: len(source.tokens)], source.tokens)


def test_half_a_character_of_bytes_is_shown_and_not_an_error():
    assert tokenizers.Bytes().decode(np.array([0xE2, 0x82, 97])) == "\ufffda"


def test_the_smallest_type_holds_all_tokens():
    sizes = {2: 1, 256: 1, 257: 2, 65_536: 2, 65_537: 4}
    for num, size in sizes.items():
        kind = np.dtype(tokenizers.dtype_of(num))
        assert kind.itemsize == size and np.iinfo(kind).max >= num - 1


def test_errors_name_what_is_wrong(write, tmp_path):
    path = write(a=HUNDRED)
    for fields, error, said in [
        ({}, ValueError, "corpus, path: give one of them; corpora: pydoc"),
        ({"corpus": "pydoc", "path": path}, ValueError, "corpus, path: give one"),
        ({"corpus": "text8"}, ValueError, "corpus: unknown 'text8'; known: pydoc"),
        ({"path": path + "/b"}, FileNotFoundError, "b: no such file or folder"),
        ({"path": path, "suffix": ".md"}, FileNotFoundError, "no file that ends in"),
        ({"path": path, "length": 11}, ValueError, "split 'test' has 10 tokens, too"),
        ({"path": path, "length": 91}, ValueError, "split 'train' has 90 tokens"),
        ({"path": path, "length": 0}, ValueError, "length: must be at least 1, got 0"),
        ({"path": path, "stride": 0}, ValueError, "stride: must be at least 1, got 0"),
        ({"path": path, "tokenizer": "words"}, ValueError, "tokenizer: expected 'char"),
        ({"path": path, "tokenizer": "a.json"}, FileNotFoundError, "a.json: no such f"),
    ]:
        split = {"split": "test"} if "split 'test'" in said else {}
        with pytest.raises(error, match=said):
            Text(**fields, **split)
    write(a=b"abc\xffdef")
    with pytest.raises(ValueError, match=r"a.txt' is not UTF-8: byte 0xff at 3\."):
        Text(path=path, length=1)
    write(a="")
    with pytest.raises(ValueError, match="path: there is no text to train on"):
        Text(path=path, length=1)
    with pytest.raises(ValueError, match="config.data.source.corpus: unknown"):
        block = {"name": "text", "corpus": "a"}
        registry.build("source", block, "config.data.source")


@pytest.mark.parametrize("name", ["tokenizers", "sentencepiece"])
def test_a_missing_library_is_a_line(name, write, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    suffix = {"tokenizers": ".json", "sentencepiece": ".model"}[name]
    file = tmp_path / f"made{suffix}"
    file.write_text("{}")
    with pytest.raises(ModuleNotFoundError, match=f"run 'pip install {name}', or use"):
        Text(path=write(a=HUNDRED), tokenizer=str(file))


def test_a_tokenizer_of_hugging_face(write, tmp_path):
    library = pytest.importorskip("tokenizers")
    words = {"<end>": 0, "the": 1, "cat": 2, "sat": 3, "<unk>": 4}
    made = library.Tokenizer(library.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<end>", "<extra>"])
    made.post_processor = library.processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", 0)]
    )
    # What would cut and fill every document.
    made.enable_truncation(2)
    made.enable_padding(length=9)
    made.save(str(tmp_path / "made.json"))
    folder = write(a="the cat sat " * 3, b="sat dog")
    source = Text(
        path=folder,
        tokenizer=str(tmp_path / "made.json"),
        length=2,
        separator="<end>",
        test_fraction=0.25,
    )
    assert source.spec.num_tokens == 6
    assert source.tokens.tolist() == [1, 2, 3] * 3
    assert dataclasses.replace(source, split="test").tokens.tolist() == [0, 3, 4]
    assert source.decode(source.encode("cat sat<end>")) == "cat sat <end>"
    (tmp_path / "made.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer: cannot read '.*made.json'"):
        dataclasses.replace(source)


def test_a_model_of_sentence_piece(write, tmp_path):
    library = pytest.importorskip("sentencepiece")
    content = "the cat sat on the mat and the dog sat on the cat "
    library.SentencePieceTrainer.train(
        sentence_iterator=iter([content] * 20),
        model_prefix=str(tmp_path / "made"),
        vocab_size=16,
        minloglevel=2,
    )
    source = Text(
        path=write(a=content, b=content),
        tokenizer=str(tmp_path / "made.model"),
        length=4,
        separator="</s>",
    )
    assert source.spec.num_tokens == 16
    assert source.decode(source.encode("the dog sat")) == "the dog sat"
    end = np.flatnonzero(source.tokens == 2)
    assert len(end) == 1 and source.decode(source.tokens[: end[0]]) == content.strip()


def test_both_splits_read_the_text_once(write, monkeypatch):
    calls, plain = [], text._documents
    monkeypatch.setattr(
        text, "_documents", lambda files: (calls.append(files), plain(files))[1]
    )
    train = Text(path=write(a=HUNDRED), length=4)
    dataclasses.replace(train, split="test")
    assert len(calls) == 1
