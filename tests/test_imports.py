"""The imports say which room depends on which; architecture.md, section 1."""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "diffusionlab"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import from its own row (other files of its package included) and from the
# rows above. Each is a top-level name of the package.
ROWS = [
    {"types", "keys", "registry", "settings", "progress", "multihost", "pictures",
     "texts", "flops", "ema", "revision", "inline", "STARTED"},
    {"schedules", "config", "machine", "sharding", "optim", "averages", "preemption"},
    {"processes", "workdir", "writers"},
    {"inherit", "stored_tree", "best", "explain"},
    {"metrics", "features"},
    {"guidance", "samplers", "objectives", "models", "data", "evals"},
    {"distillation"},
    {"checks", "curves", "strip"},
    {"report_tables"},
    {"experiment", "report"},
    {"state"},
    {"train_step", "checkpoint"},
    {"restore"},
    {"inference"},
    {"sample", "infilling", "evaluate", "compiled", "file_inputs", "teachers",
     "pairs"},
    {"hooks", "evaluate_files"},
    {"train"},
    {"describe", "import_weights"},
    {"main"},
]  # fmt: skip
# What these may see besides their own package.
NARROW = {
    "models": {"types"},
    "data": {"types"},
    "metrics": {"types", "pictures", "features"},
    "features": {"types"},
    "evals": {
        "types",
        "keys",
        "pictures",
        "samplers",
        "metrics",
        "features",
        "multihost",
        "objectives",
    },
    "schedules": {"types"},
    "processes": {"types", "schedules"},
    "samplers": {"types", "processes"},
    "objectives": {"types", "schedules", "processes"},
    "distillation": {
        "types",
        "schedules",
        "processes",
        "objectives",
        "guidance",
        "samplers",
    },
    "guidance": {"types"},
}
ONLY = {
    "flax.linen": {"models"},
    "orbax": {"checkpoint", "stored_tree"},
    "grain": {"data"},
    "tensorflow_datasets": {"data"},
    "array_record": {"data"},
    "tensorboardX": {"writers", "features"},
    "wandb": {"writers"},
    "sklearn": {"data", "evals", "features"},
}


def room(file):
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(text):
    """Yields the dotted name of everything a module imports, wherever it does."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def of(file):
    return set(imported(file.read_text()))


def inside(name, package):
    return name == package or name.startswith(package + ".")


def test_reader_of_imports_sees_all_forms():
    text = "import a.b\nfrom c import d as e\ndef f():\n  from g.h import i, j"
    assert set(imported(text)) == {"a.b", "c.d", "g.h.i", "g.h.j"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_dependencies_point_one_way(file):
    here = room(file)
    if here == "__init__":
        assert of(file) <= {"time"}
        return
    row = next(i for i, names in enumerate(ROWS) if here in names)
    allowed = {here}.union(*ROWS[: row + 1])
    if here in NARROW:
        allowed = {here} | NARROW[here]
    for name in of(file):
        if inside(name, "diffusionlab"):
            assert name.split(".")[1] in allowed, f"{here} imports {name}"


def test_no_room_of_a_row_imports_another_that_imports_it():
    edges = {}
    for file in FILES:
        for name in of(file):
            if inside(name, "diffusionlab"):
                edges.setdefault(room(file), set()).add(name.split(".")[1])
    for a, targets in edges.items():
        for b in targets - {a}:
            assert a not in edges.get(b, set()), f"{a} and {b} import each other"


@pytest.mark.parametrize("package", ONLY)
def test_library_is_imported_in_its_room_only(package):
    users = {room(f) for f in FILES for name in of(f) if inside(name, package)}
    assert users <= ONLY[package]
    if package == "flax.linen":
        assert users == {"models"}


@pytest.mark.parametrize("package", ["configs", "launch", "tests"])
def test_package_imports_nothing_that_uses_it(package):
    assert not [f for f in FILES for name in of(f) if inside(name, package)]


def test_tensorflow_is_imported_nowhere():
    files = [*FILES, *ROOT.glob("configs/**/*.py"), *ROOT.glob("launch/**/*.py")]
    for file in files:
        for name in of(file):
            for package in ("tensorflow", "clu.metric_writers", "clu.periodic_actions"):
                assert not inside(name, package), file


def test_modules_of_the_first_answer_import_no_jax():
    for name in ("main", "config", "registry", "settings", "workdir", "progress"):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        text = "\n".join(ast.unparse(node) for node in top)
        assert "jax" not in text, name
        assert "diffusionlab.types" not in text, name
