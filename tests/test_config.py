import copy
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping

import ml_collections
import pytest

from diffusionlab import config as config_lib
from diffusionlab import experiment, optim

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Those of students are whole with a teacher only: integration/test_students.py.
FILES = sorted(
    path for path in ROOT.glob("configs/*/*.py") if path.parent.name != "distillation"
)
FILES = [f for f in FILES if f.name != "__init__.py"]
MIXTURE = str(ROOT / "configs/mixture/denoising.py")

ROLE = "optim.denoiser"
RATE = f"{ROLE}.learning_rate.value"
GUIDE = "guidance.classifier_free"


def variants(file):
    """Reads the variants out of the message that refuses one."""
    with pytest.raises(ValueError, match="no variant 'nonsense'") as error:
        config_lib.load(f"{file}:nonsense")
    return re.findall(r"'([^']*)'", str(error.value).partition("there are")[2])


ALL = [f"{file}:{variant}" for file in FILES for variant in variants(file)]


def name_of(path):
    return "/".join(pathlib.Path(path).parts[-2:])


@pytest.fixture
def mixture():
    return config_lib.load(f"{MIXTURE}:smoke")


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_config_has_a_smoke_variant(file):
    assert "smoke" in variants(file)


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_variant_resolves_to_all_blocks_and_survives_json(path):
    resolved = config_lib.resolve(config_lib.load(path))
    assert tuple(resolved) == config_lib.BLOCKS
    assert config_lib.resolve(resolved) == resolved
    assert json.loads(json.dumps(resolved)) == resolved


def test_resolving_imports_no_jax():
    code = """
import sys
from diffusionlab import config
for path in sys.argv[1:]:
    config.resolve(config.load(path))
heavy = {"jax", "flax", "optax", "grain", "tensorflow", "orbax"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code, *ALL], check=True, cwd=ROOT)


def blocks(tree, path=()):
    """Yields the path of every block."""
    yield path
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from blocks(value, (*path, key))


@pytest.mark.parametrize("name", ["mixture", "imagenet64"])
def test_unknown_key_in_any_block_is_an_error_that_names_it(name):
    path = f"{ROOT}/configs/{name}/denoising.py:smoke"
    resolved = config_lib.resolve(config_lib.load(path))
    tried = 0
    for where in blocks(resolved):
        changed = copy.deepcopy(resolved)
        block = changed
        for key in where:
            block = block[key]
        block["perturbed"] = 1
        with pytest.raises((ValueError, TypeError)) as error:
            config_lib.resolve(changed)
            # What an optax function accepts is known only to optax.
            built = experiment.build(changed)
            optim.make(built.optim["denoiser"], {}, "config.optim.denoiser")
        assert ".".join(("config", *where, "perturbed")) in str(error.value)
        tried += 1
    assert tried > 20


def test_missing_block_is_named(mixture):
    del mixture["sampler"]
    with pytest.raises(ValueError, match="config.sampler: missing"):
        config_lib.resolve(mixture)


def test_unknown_block_is_named_with_the_nearest(mixture):
    mixture.sampel = {}
    with pytest.raises(ValueError, match="config.sampel: unknown key; did you mean"):
        config_lib.resolve(mixture)


@pytest.mark.parametrize("seed", [1.0, "0", True, None])
def test_seed_is_an_int(mixture, seed):
    with mixture.ignore_type():
        mixture.seed = seed
    with pytest.raises(TypeError, match="config.seed: expected int"):
        config_lib.resolve(mixture)


@pytest.mark.parametrize("key", config_lib.BLOCKS[1:])
def test_number_where_a_block_belongs_is_an_error(mixture, key):
    resolved = {**config_lib.resolve(mixture), key: 3}
    with pytest.raises((TypeError, ValueError), match=rf"config\.{key}: expected a bl"):
        config_lib.resolve(resolved)


def test_value_out_of_range_is_named(mixture):
    mixture.train.num_steps = -1
    with pytest.raises(ValueError, match="config.train.num_steps: must be at least 0"):
        config_lib.resolve(mixture)


def test_file_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="there is no file 'configs/none.py'"):
        config_lib.load("configs/none.py:smoke")


def test_file_without_get_config_is_named(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="has no function get_config"):
        config_lib.load(str(tmp_path / "empty.py"))


@pytest.mark.parametrize(
    "assignment, path, value",
    [
        ("train.num_steps=7", "train.num_steps", 7),
        (f"{RATE}=1", RATE, 1.0),
        (f"{RATE}=1e-4", RATE, 1e-4),
        ("logging.tensorboard=false", "logging.tensorboard", False),
        ("precision.compute=bfloat16", "precision.compute", "bfloat16"),
        (f"{ROLE}.decay_on=('a.*b','c')", f"{ROLE}.decay_on", ["a.*b", "c"]),
        (f"{ROLE}.multipliers=(('e.*', 0.1),)", f"{ROLE}.multipliers", [["e.*", 0.1]]),
        ("sampler={'name': 'ancestral', 'num_steps': 3}", "sampler.num_steps", 3),
        ("guidance.clip_x={}", "guidance.clip_x", {}),
        (f"{GUIDE}.logsnr_min=none", f"{GUIDE}.logsnr_min", None),
    ],
)  # fmt: skip
def test_override_sets_a_value_of_the_right_type(mixture, assignment, path, value):
    config_lib.override(mixture, [assignment])
    found = config_lib.resolve(mixture)
    for key in path.split("."):
        found = found[key]
    if isinstance(value, dict):
        assert isinstance(found, dict)
    else:
        assert found == value and type(found) is type(value)


def test_none_is_a_word_where_a_word_was():
    config = ml_collections.ConfigDict({"input_noise": "gaussian", "logsnr": 1.0})
    config_lib.override(config, ["input_noise=none", "logsnr=none"])
    assert config.to_dict() == {"input_noise": "none", "logsnr": None}


def test_whole_block_override_replaces_the_block(mixture):
    config_lib.override(mixture, ["sampler={'name': 'ancestral', 'num_steps': 3}"])
    resolved = config_lib.resolve(mixture)["sampler"]
    assert resolved["name"] == "ancestral" and "noise_exponent" in resolved


@pytest.mark.parametrize(
    "assignment, said",
    [
        ("train.num_steps=1.5", "config.train.num_steps: expected int, got 1.5"),
        ("train.num_steps=true", "config.train.num_steps: expected int, got True"),
        ("train.num_steps=many", "config.train.num_steps: expected int, got 'many'"),
        ("ema.main.decay=false", "config.ema.main.decay: expected float, got False"),
        ("ema.main.decay=true", "config.ema.main.decay: expected float, got True"),
        ("sampler=3", "config.sampler: is a block; set one of its keys"),
    ],
)
def test_override_of_the_wrong_type_is_an_error(mixture, assignment, said):
    with pytest.raises(TypeError, match=re.escape(said)):
        config_lib.override(mixture, [assignment])


@pytest.mark.parametrize(
    "assignment, said",
    [
        (
            "samper.num_steps=3",
            "config.samper: there is no such block; did you mean 's",
        ),
        ("optim.student.name=adam", "config.optim.student: there is no such block"),
        ("seed.x=3", "config.seed: there is no such block"),
        ("seed", "config.seed: write --config.seed=VALUE"),
    ],
)
def test_override_of_no_block_is_an_error(mixture, assignment, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        config_lib.override(mixture, [assignment])


def test_override_of_an_unknown_key_is_refused_when_resolving(mixture):
    config_lib.override(mixture, ["sampler.num_stps=3"])
    with pytest.raises(ValueError, match="config.sampler.num_stps: unknown key"):
        config_lib.resolve(mixture)


@pytest.mark.parametrize(
    "assignment, said",
    [
        ("optim.denoiser.decay_on=kernel", "decay_on: expected tuple, got 'kernel'"),
        ("optim.denoiser.options=3", "options: expected Mapping, got 3"),
        ("data.augment=3", "augment: expected Mapping, got 3"),
        ("logging.wandb=1", "logging.wandb: expected str, got 1"),
        ("guidance.clip_x=true", "guidance.clip_x: expected a block, got True"),
    ],
)
def test_unstated_key_of_the_wrong_type_is_refused_when_resolving(
    mixture, assignment, said
):
    config_lib.override(mixture, [assignment])
    with pytest.raises(TypeError, match=said):
        config_lib.resolve(mixture)


def test_multipliers_are_pairs(mixture):
    config_lib.override(mixture, ["optim.denoiser.multipliers=('abc',)"])
    with pytest.raises(ValueError, match="denoiser.multipliers: expected pairs"):
        config_lib.resolve(mixture)


def test_differences_name_every_leaf_that_differs():
    old = {"a": {"b": 1, "c": 2}, "d": 3}
    new = {"a": {"b": 1, "c": 5}, "e": {"f": 1}}
    assert config_lib.differences(old, new) == [
        "a.c: 2 -> 5",
        "d: 3 -> (absent)",
        "e: (absent) -> {'f': 1}",
    ]
    assert config_lib.differences(old, old) == []


def test_conflicts_leave_out_what_may_change(mixture):
    old = config_lib.resolve(mixture)
    for assignment in (
        "train.num_steps=99", "mesh.fsdp=2", "sampler.num_steps=9", "logging.every=7",
        "checkpoint.every=3", "data.prefetch=9",
    ):  # fmt: skip
        config_lib.override(mixture, [assignment])
    assert config_lib.conflicts(old, config_lib.resolve(mixture)) == []
    config_lib.override(mixture, ["train.micro_batches=2", "seed=1"])
    assert config_lib.conflicts(old, config_lib.resolve(mixture)) == [
        "seed: 0 -> 1",
        "train.micro_batches: 1 -> 2",
    ]


def test_a_stored_config_is_completed_block_by_block(mixture):
    new = config_lib.resolve(mixture)
    old = copy.deepcopy(new)
    del old["train"]["micro_batches"], old["guidance"]
    old["logging"]["no_longer"] = 1
    done = config_lib.completed(old)
    assert done["train"] == new["train"]
    assert done["logging"] == old["logging"] and "guidance" not in done
    del old["optim"]["denoiser"]["clip_norm"]
    assert config_lib.conflicts(old, new) == []
    old["data"]["no_longer"] = 1
    assert config_lib.conflicts(old, new) == ["data.no_longer: 1 -> (absent)"]


def test_key_that_only_begins_like_one_that_may_change_is_a_conflict():
    assert config_lib.conflicts({"mesh_x": 1}, {"mesh_x": 2}) == ["mesh_x: 1 -> 2"]


def test_text_has_one_key_a_line():
    text = config_lib.to_text({"a": 1, "b": {"c": "x", "d": {}}})
    assert text == "a: 1\nb:\n  c: 'x'\n  d: {}"


def test_text_that_looks_like_a_number_stays_text(smoke):
    source = "{'name': 'npz', 'path': 'a.npz'}"
    overrides = [f"data.source={source}", "data.source.path=2024_10_01"]
    assert smoke("digits", *overrides)["data"]["source"]["path"] == "2024_10_01"


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_seed_out_of_range_is_refused(smoke, seed):
    with pytest.raises(ValueError, match="config.seed: must be in"):
        smoke("mixture", f"seed={seed}")


def test_checkpoints_kept_for_ever_must_be_among_those_saved(smoke):
    with pytest.raises(ValueError, match="checkpoint.keep_every: must be a multiple"):
        smoke("mixture", "checkpoint.every=4", "checkpoint.keep_every=6")
