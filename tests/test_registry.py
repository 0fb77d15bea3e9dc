import subprocess
import sys
import textwrap

import pytest

from diffusionlab import registry


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Writes a module outside the package that names can point into."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return name

    return write


def check(block, kind="sampler"):
    return registry.check(kind, block, f"config.{kind}")


def test_unknown_name_is_an_error_with_the_nearest_and_all_known():
    with pytest.raises(ValueError) as error:
        check(dict(name="dddim"))
    assert str(error.value).startswith(
        "config.sampler.name: unknown sampler 'dddim'; did you mean 'ddim'? Known: "
        "adams_bashforth, "
    )


def test_name_near_nothing_gets_no_suggestion():
    with pytest.raises(ValueError, match="unknown sampler 'zzz'. Known"):
        check(dict(name="zzz"))


@pytest.mark.parametrize("block", [{}, {"num_steps": 3}, 3, "ddim", None])
def test_block_without_a_name_is_an_error(block):
    with pytest.raises(ValueError, match="config.sampler: expected a block with a"):
        check(block)


def test_name_that_is_no_string_is_an_error():
    with pytest.raises(ValueError, match="config.sampler.name: expected a string"):
        check(dict(name=3))


def test_unknown_key_names_the_key_the_nearest_and_the_accepted():
    with pytest.raises(ValueError) as error:
        check(dict(name="ancestral", num_step=3))
    message = str(error.value)
    assert message.startswith("config.sampler.num_step: unknown key; did you mean")
    assert "'num_steps'?" in message
    accepted = message.partition("Accepted: ")[2]
    assert "noise_exponent" in accepted and "num_steps" in accepted


def test_missing_key_is_named():
    with pytest.raises(ValueError, match=r"config\.sampler\.num_steps: missing"):
        check(dict(name="ddim"))


@pytest.mark.parametrize(
    "value, ok",
    [(4, True), (4.0, False), ("4", False), (True, False), (None, False)],
)
def test_int_keyword_takes_only_an_int(value, ok):
    block = dict(name="ddim", num_steps=value)
    if ok:
        assert check(block)["num_steps"] == value
    else:
        with pytest.raises(TypeError, match="config.sampler.num_steps: expected int"):
            check(block)


@pytest.mark.parametrize(
    "annotation, good, bad",
    [
        ("float", [1, 2.5], [True, "1", None]),
        ("bool", [True], [1, 0]),
        ("str", ["a"], [1]),
        ("float | None", [None, 1.0], ["x", False]),
        ("tuple[int, ...]", [(1, 2), [1], ()], ["12", 3, (8.5,), (1, True)]),
        ("tuple[float, ...] | None", [None, (1, 0.5)], [(0.5, "a"), (None,)]),
        ("tuple", [(1, "a")], [1]),
        ("Mapping", [{}], [3, [1]]),
        ("Anything", [object()], []),
    ],
)
def test_types_are_checked_by_annotation(annotation, good, bad):
    for value in good:
        registry._check_type(value, annotation, "config.x")
    for value in bad:
        with pytest.raises(TypeError, match=r"config\.x(\[\d\])?: expected"):
            registry._check_type(value, annotation, "config.x")


def test_wrong_element_of_a_tuple_is_named():
    with pytest.raises(TypeError, match=r"config\.x\[1\]: expected float, got 'a'"):
        registry._check_type((0.5, "a"), "tuple[float, ...]", "config.x")
    block = dict(name="sampler_comparison", num_evaluations=(8, 8.5))
    with pytest.raises(
        TypeError, match=r"config.evaluator.num_evaluations\[1\]: expec"
    ):
        check(block, "evaluator")


def test_defaults_are_stated():
    done = check(dict(name="classifier_free"), "guidance")
    assert done == dict(
        name="classifier_free",
        guidance_scale=1.0,
        logsnr_min=None,
        logsnr_max=None,
        two_pass=False,
        rescale=0.0,
    )


def test_default_factories_are_stated(plugin):
    plugin(
        "with_factories",
        """
        import dataclasses
        from dataclasses import field

        @dataclasses.dataclass
        class C:
            a: dict = dataclasses.field(default_factory=dict)
            b: list = field(default_factory=lambda: [1, 2])
            c: int = field(default=3)
        """,
    )
    done = check(dict(name="with_factories:C"))
    assert done == dict(name="with_factories:C", a={}, b=[1, 2], c=3)


def test_default_that_no_config_can_state_is_an_error(plugin):
    plugin("computed", "LIMIT = 3\n\ndef f(*, a: int = LIMIT): ...\n")
    with pytest.raises(ValueError, match="name: 'computed:f': the default of 'a' is"):
        check(dict(name="computed:f"))


def test_nested_block_is_checked_with_its_path():
    block = dict(name="gaussian", prediction="v", schedule=dict(name="cosine", shfit=1))
    with pytest.raises(ValueError, match="config.process.schedule.shfit: unknown key"):
        check(block, "process")
    block["schedule"] = dict(name="cosin")
    with pytest.raises(ValueError, match="schedule.name: .* did you mean 'cosine'"):
        check(block, "process")


@pytest.mark.parametrize("value", [dict(shift=1), "cosine"])
def test_nested_block_without_a_name_is_an_error(value):
    with pytest.raises(ValueError, match="config.process.schedule: expected a block"):
        check(dict(name="gaussian", prediction="v", schedule=value), "process")


def test_nested_defaults_are_stated():
    block = dict(name="gaussian", prediction="v", schedule=dict(name="cosine"))
    done = check(block, "process")
    assert len(done["schedule"]) > 1


def test_context_is_never_a_config_key():
    with pytest.raises(ValueError, match="config.network.dtype: unknown key"):
        check(dict(name="mlp", dtype="float32"), "network")


def test_build_makes_nested_objects_and_freezes_lists(plugin):
    plugin(
        "keeper",
        """
        import dataclasses

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Keeper:
            schedule: object
            sides: tuple = ()
            spec: object = None
        """,
    )
    built = registry.build(
        "process",
        dict(name="keeper:Keeper", schedule=dict(name="flow"), sides=[[1], 2]),
        "config.process",
        spec="given",
        unwanted=1,
    )
    assert type(built.schedule).__name__ == "Flow"
    assert built.sides == ((1,), 2) and hash(built.sides)
    assert built.spec == "given"


def test_error_of_the_object_gets_the_path():
    block = dict(name="exponential", decay=2.0)
    with pytest.raises(ValueError, match=r"^config\.ema\.main\.decay: must be in"):
        registry.build("ema", block, "config.ema.main")


def test_plug_in_is_built_by_module_and_object(plugin):
    plugin("outside", "def make(*, width: int, depth: int = 2): return width, depth\n")
    block = dict(name="outside:make", width=3)
    assert registry.build("sampler", block, "config.sampler") == (3, 2)
    with pytest.raises(ValueError, match="widht: unknown key; did you mean 'width'"):
        check(dict(name="outside:make", widht=3))


def test_reexported_plug_in_is_read_where_it_is_defined(plugin):
    plugin(
        "deep",
        """
        import dataclasses

        @dataclasses.dataclass
        class C:
            a: int
            b: dict = dataclasses.field(default_factory=dict)
        """,
    )
    plugin("shallow", "from deep import C\n")
    assert check(dict(name="shallow:C", a=1)) == dict(name="shallow:C", a=1, b={})
    with pytest.raises(TypeError, match="config.sampler.a: expected int"):
        check(dict(name="shallow:C", a="1"))


def test_made_plug_in_is_read_from_its_signature(plugin):
    plugin(
        "made",
        """
        def outer():
            def inner(a, b=2):
                return a + b
            return inner
        f = outer()
        """,
    )
    assert check(dict(name="made:f", a=1)) == dict(name="made:f", a=1, b=2)


@pytest.mark.parametrize(
    "name, said", [("no_such:C", "no module 'no_such'"), ("json:Nope", "no 'Nope'")]
)
def test_plug_in_that_is_not_there_is_named(name, said):
    with pytest.raises(ValueError, match=f"config.sampler.name: '{name}': .*{said}"):
        check(dict(name=name))


def test_every_registered_name_can_be_read_and_loaded():
    for kind in registry.kinds():
        for name, where in registry.table(kind).items():
            assert registry.parameters(where) is not None, name
            assert callable(registry.load(where)), name


def test_checking_imports_no_jax():
    code = """
import sys
from diffusionlab import registry
for kind in registry.kinds():
    for where in registry.table(kind).values():
        registry.parameters(where)
heavy = {"jax", "flax", "optax", "grain", "tensorflow", "orbax"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
