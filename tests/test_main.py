import errno
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from diffusionlab import explain, main, workdir

DIGITS = "configs/digits/denoising.py:smoke"
FILES = ["--mode=eval", "--samples=x.npz", "--reference=digits"]

# Runs the program with an import of JAX forbidden.
WITHOUT_JAX = """
import sys
for name in ("jax", "flax", "optax", "grain", "orbax", "tensorflow"):
    sys.modules[name] = None
from diffusionlab import main
main.main()
"""


@pytest.fixture
def without_jax(root):
    def run(*args):
        return subprocess.run(
            [sys.executable, "-c", WITHOUT_JAX, *map(str, args)],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_help_imports_no_jax_and_names_every_mode(without_jax):
    done = without_jax("--help")
    assert done.returncode == 0 and done.stderr == ""
    for mode in main.MODES:
        assert f"\n  {mode}" in done.stdout


@pytest.mark.parametrize(
    "args, said",
    [
        (["--worksdir=x"], "--worksdir=x: unknown flag; did you mean '--workdir'?"),
        (["stray"], "stray: unknown flag."),
        (["--config=" + DIGITS], "--workdir: missing; mode train needs a run dir"),
        (["--mode=sample"], "--workdir: missing; mode sample needs a run directory"),
        (["--workdir={d}"], "--config: missing; for example --config=configs/"),
        (["--mode=config"], "--config: missing"),
        (["--mode=eval", "--workdir={d}"], "holds no run (there is no config.json)"),
        (["--config=none.py", "--workdir={d}"], "there is no file 'none.py'"),
        (["--config=" + DIGITS + "r", "--workdir={d}"], "no variant 'smoker'"),
        (["--config={c}", "--workdir={d}", "--config.sampler.num_stps=3"],
         "config.sampler.num_stps: unknown key; did you mean 'num_steps'?"),
        (["--config={c}", "--workdir={d}", "--config.sampler.name=huen"],
         "config.sampler.name: unknown sampler 'huen'"),
        (["--config={c}", "--workdir={d}", "--config.train.num_steps=x"],
         "config.train.num_steps: expected int, got 'x'"),
        (["--config={c}", "--workdir={d}", "--part=2"], "--part: expected K/N"),
        (["--config={c}", "--workdir={d}",
          "--config.evals={{'a/b': {{'name': 'samples'}}}}"],
         "config.evals.a/b: a label has letters, digits, - and _ only."),
    ],
)  # fmt: skip
def test_mistake_is_one_line_without_jax_and_writes_nothing(
    without_jax, tmp_path, args, said
):
    folder = tmp_path / "run"
    done = without_jax(*(a.format(d=folder, c=DIGITS) for a in args))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("diffusionlab: error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_directory_of_something_else_is_refused_without_jax(without_jax, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    done = without_jax(f"--config={DIGITS}", f"--workdir={tmp_path}")
    assert done.returncode == 1 and "is not empty and holds no run" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_wrong_choice_is_refused_by_the_parser(without_jax):
    done = without_jax("--mode=trian")
    assert done.returncode == 2 and "'train', 'sample', 'eval'" in done.stderr


def test_flags_are_never_abbreviated(without_jax):
    done = without_jax("--work=x")
    assert "--work=x: unknown flag" in done.stderr


def test_override_flags_keep_their_order():
    flags = main.parser()
    _, unknown = flags.parse_known_args(["--config.a=1", "--config=x", "--config.b=2"])
    assert main._overrides(unknown, flags) == ["a=1", "b=2"]


@pytest.mark.parametrize("text, part", [("0/1", (0, 1)), ("1/2", (1, 2))])
def test_part_is_which_of_how_many(text, part):
    assert main._part(text) == part


@pytest.mark.parametrize("text, step", [("20", 20), ("0", 0), ("best", "best")])
def test_step_is_a_number_or_best(text, step):
    assert main.parser().parse_args([f"--step={text}"]).step == step


@pytest.mark.parametrize("text", ["bset", "-1", "1.5", ""])
def test_other_steps_are_refused(capsys, text):
    with pytest.raises(SystemExit):
        main.parser().parse_args([f"--step={text}"])
    assert "expected a step or 'best'" in capsys.readouterr().err


def test_best_step_of_a_run_without_one_is_one_line(tmp_path, smoke):
    workdir.claim(tmp_path, smoke("digits"), {}, {})
    with pytest.raises(ValueError, match="^--step=best: .* has no best.json"):
        main.run(["--mode=eval", f"--workdir={tmp_path}", "--step=best"])


def test_best_step_is_that_of_the_run(tmp_path, smoke, monkeypatch):
    workdir.claim(tmp_path, smoke("digits"), {}, {})
    (tmp_path / "checkpoints" / "30").mkdir(parents=True)
    workdir.write_json(tmp_path / "best.json", {"step": 30})
    found = []
    monkeypatch.setattr(main, "_set_up_jax", lambda args: "off")
    monkeypatch.setattr(main, "_use", lambda args, *_: found.append(args.step))
    for mode in ("eval", "sample"):
        main.run([f"--mode={mode}", f"--workdir={tmp_path}", "--step=best"])
    assert found == [30, 30]


@pytest.mark.parametrize(
    "args, said",
    [
        (["--mode=eval", "--samples=x.npz"], "--reference: missing; what are the"),
        (["--mode=eval", "--reference=digits"], "--reference: goes with --mode=eval"),
        (["--samples=x.npz"], "--samples: goes with --mode=eval and --samples=PATH"),
        ([*FILES, "--workdir=x"], "--workdir: is of a run, and --samples need none"),
        ([*FILES, "--step=best"], "--step: is of a run"),
        ([*FILES, "--config=none.py"], "there is no file 'none.py'"),
        ([*FILES, "--config={empty}"], "has no evaluators (`evals`)"),
        ([*FILES, "--config.evals={{}}"], "config.evals: empty, and --samples need an"),
        ([*FILES, "--config.evals={{'a/b': {{'name': 'samples'}}}}"],
         "config.evals.a/b: a label has letters, digits, - and _ only."),
        ([*FILES, "--config.seed=1"], "config.seed: with --samples only config.evals"),
        ([*FILES, "--config.sampler.name=ddim"], "config.sampler: there is no such"),
        ([*FILES, "--config.evals.quality.num_sampels=1"],
         "config.evals.quality.num_sampels: unknown key; did you mean 'num_samples'?"),
        ([*FILES, "--config.evals.quality.extractor.name=incpetion"],
         "config.evals.quality.extractor.name: unknown extractor 'incpetion'"),
    ],
)  # fmt: skip
def test_mistake_about_samples_is_answered_before_jax(
    tmp_path, monkeypatch, args, said
):
    monkeypatch.setattr(main, "_set_up_jax", lambda args: pytest.fail("too late"))
    empty = tmp_path / "empty.py"
    empty.write_text("def get_config(variant):\n    return {'evals': {}}\n")
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        main.run([arg.format(empty=empty) for arg in args])
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.fixture
def files(monkeypatch):
    """`files(*flags)`: what the program hands to `evaluate_files.run`."""
    monkeypatch.setattr(main, "_set_up_jax", lambda args: "off")
    found = []
    monkeypatch.setattr(
        "diffusionlab.evaluate_files.run", lambda **given: found.append(given)
    )

    def run(*flags):
        assert main.run([*FILES, *flags]) == 0
        return found.pop()

    return run


def test_samples_are_evaluated_without_a_run(files, capsys):
    found = files()
    block = {"name": "sample_quality", "extractor": {"name": "inception"}}
    assert found["evals"] == {"quality": block}
    assert (found["samples"], found["reference"]) == ("x.npz", "digits")
    assert found["out"] is None and "results in" in capsys.readouterr().out


def test_evaluators_of_samples_are_those_asked_for(files):
    path = "--config.evals.quality.extractor.path=weights.npz"
    extractor = files(path)["evals"]["quality"]["extractor"]
    assert extractor == {"name": "inception", "path": "weights.npz"}
    evals = files(f"--config={DIGITS}", "--config.evals.samples.k=3")["evals"]
    # As the file says and no more: the rest depends on the samples.
    assert evals["samples"]["k"] == 3 and "num_columns" not in evals["samples"]


def test_cache_is_known_by_the_environment(files, monkeypatch, tmp_path):
    from diffusionlab.features import base

    monkeypatch.setenv("DIFFUSIONLAB_CACHE", "elsewhere")
    files()
    assert str(base.cache_folder()) == "elsewhere"
    files(f"--cache={tmp_path}")
    assert base.cache_folder() == tmp_path


def test_error_from_elsewhere_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(main, "run", lambda _: int("not ours"))
    with pytest.raises(ValueError, match="not ours"):
        main.main()


def throw(error):
    raise error


@pytest.mark.parametrize("number", explain._SYSTEM_ERRORS)
def test_refusal_of_the_system_is_one_line_wherever_it_was_met(
    monkeypatch, capsys, number
):
    for names, said in ((), ""), (("/x/y",), ": '/x/y'"):
        error = OSError(number, os.strerror(number), *names)
        monkeypatch.setattr(main, "run", lambda _, error=error: throw(error))
        with pytest.raises(SystemExit) as raised:
            main.main()
        assert raised.value.code == 1
        text = f"diffusionlab: error: {os.strerror(number)}{said}\n"
        assert capsys.readouterr().err == text


def test_folder_below_a_file_is_one_line(monkeypatch, capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(main, "run", lambda _: (file / "a").mkdir())
    with pytest.raises(SystemExit):
        main.main()
    said = f"diffusionlab: error: Not a directory: '{file / 'a'}'\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO, errno.EBADF])
def test_other_error_of_the_system_keeps_its_traceback(monkeypatch, number):
    error = OSError(number, os.strerror(number), "/x/y")
    monkeypatch.setattr(main, "run", lambda _: throw(error))
    with pytest.raises(OSError) as raised:
        main.main()
    assert raised.value is error


def raising(raised):
    """A `run` whose error comes out of a function that is being traced."""

    def run(_):
        jax.eval_shape(lambda x: raised(x), jnp.zeros(3))

    return run


def test_message_raised_while_tracing_is_one_line(monkeypatch, capsys):
    refuses = types.FunctionType(
        raises_itself.__code__, {"__name__": "diffusionlab.x", "ValueError": ValueError}
    )
    monkeypatch.setattr(main, "run", raising(refuses))
    with pytest.raises(SystemExit):
        main.main()
    assert capsys.readouterr().err == "diffusionlab: error: of ours\n"


def raises_itself(x):
    raise ValueError("of ours")


def test_error_of_jax_in_a_module_of_ours_keeps_its_traceback(monkeypatch):
    code, names = calls_jax.__code__, {"__name__": "diffusionlab.x", "jax": jax}
    monkeypatch.setattr(main, "run", raising(types.FunctionType(code, names)))
    with pytest.raises(ValueError, match="vmap was requested") as raised:
        main.main()
    assert raised.value.__notes__


def calls_jax(x):
    return jax.vmap(jax.numpy.sin, in_axes=3)(x)


def test_cache_is_a_folder_of_the_users_by_default(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    cache = main.parser().parse_args([]).compilation_cache
    assert cache == os.path.expanduser("~/.cache/diffusionlab/jax")


def test_mistake_is_one_line_when_run_as_a_module(program):
    done = program("--cofig=x", check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "diffusionlab: error: --cofig=x: unknown flag; did you mean '--config'?\n"
    )
