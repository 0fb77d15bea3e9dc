"""Every row of the README's table of methods is a config that trains."""

import ast
import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import experiment
from diffusionlab.types import Inputs, Network

TEXT = (pathlib.Path(__file__).resolve().parents[2] / "README.md").read_text()
SECTION = TEXT.split("## Formulations\n")[1].split("\n## ")[0]
LINES = [line for line in SECTION.splitlines() if line.startswith("|")]
CELLS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES]
KEYS = [key.strip("`") for key in CELLS[0][1:-1]]
ROWS = {cells[0]: cells[1:] for cells in CELLS[2:]}
PROSE = " ".join(line for line in SECTION.splitlines() if not line.startswith("|"))


LINEAR = Network(
    init=lambda key: jnp.float32(0.1),
    apply=lambda params, z, cond, *, train, key: params * z,
    param_axes=(),
)


def block(cell):
    """`edm sigma_data=0.5` -> {'name': 'edm', 'sigma_data': 0.5}."""
    name, *keywords = cell.strip("`").split()
    pairs = (keyword.split("=") for keyword in keywords)
    return {"name": name} | {key: ast.literal_eval(value) for key, value in pairs}


def overrides(row):
    *blocks, other = ROWS[row]
    found = re.findall(r"`([\w.]+=.*?)`", other)
    for key, cell in zip(KEYS, blocks, strict=True):
        # A prediction is a word, the others are blocks.
        value = cell.strip("`") if key == "process.prediction" else block(cell)
        found.append(f"{key}={value}")
    if "objective.learned_weighting=True" in found:
        found += re.findall(r'`--config\.(\w+\.uncertainty)="(.*?)"`', PROSE)
    return [f if isinstance(f, str) else "=".join(f) for f in found]


def test_the_table_is_read():
    assert KEYS == [
        "process.schedule",
        "process.prediction",
        "objective.weighting",
        "objective.times",
    ]
    assert len(ROWS) >= 18
    example = re.search(r'cell `(.*?)` is the block `--config\.(.*?)="(.*?)"`', PROSE)
    assert example[2] in KEYS
    assert block(example[1]) == ast.literal_eval(example[3])


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_a_config_whose_loss_and_gradient_are_finite(row, smoke):
    found = overrides(row)
    images = any(override.startswith("objective.scales") for override in found)
    built = experiment.build(smoke("digits" if images else "mixture", *found))
    shape, num_classes = built.spec.shape, built.spec.num_classes
    # The config's own networks are built above; a linear one compiles in no time.
    objective = dataclasses.replace(
        built.objective, networks={**built.networks, "denoiser": LINEAR}
    )
    batch = {"x": np.random.default_rng(0).normal(size=(16, *shape))}
    if num_classes:
        batch["label"] = np.arange(16) % num_classes
    inputs = Inputs(batch, jax.random.key(0), np.int32(0), {}, {})
    (phase,) = objective.phases.values()

    @jax.jit
    def gradient(inputs):
        params = {
            role: objective.networks[objective.roles[role].network].init(inputs.key)
            for role in phase.trains
        }
        return jax.value_and_grad(phase.loss, has_aux=True)(params, inputs)

    (loss, metrics), grad = gradient(inputs)
    assert np.isfinite(loss) and set(grad) == set(phase.trains)
    for leaf in jax.tree.leaves((metrics, grad)):
        assert np.all(np.isfinite(leaf))
    for role in phase.trains:
        slopes = jax.tree.leaves(grad[role])
        assert any(np.any(np.asarray(slope) != 0) for slope in slopes), role
