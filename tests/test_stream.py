"""Samples in batches, Sobol noise, and functions over sharded rows."""

import types as python_types

import jax
import numpy as np
import pytest

from diffusionlab import inference, settings, sharding
from diffusionlab.types import DataSpec


def experiment(size=8, shape=(3,), classes=3, seed=5):
    return python_types.SimpleNamespace(
        spec=DataSpec(shape, classes),
        seed=seed,
        logging=python_types.SimpleNamespace(num_samples=size),
    )


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(settings.Mesh(data=4, fsdp=2))


def echo(params, seed, indices, labels, noise=None):
    """Says which samples it was asked for."""
    rows = np.stack([indices, labels, np.full_like(indices, seed)], 1)
    return rows.astype(np.float32) if noise is None else noise


def run(mesh, num, start=0, sobol=False, **options):
    built = experiment(**options)
    parts = list(inference.stream(built, mesh, echo, None, num, start, sobol))
    sizes = [len(x) for x, _ in parts]
    return (*(np.concatenate(p) for p in zip(*parts, strict=True)), sizes)


def test_samples_come_in_batches_of_one_size_with_classes_in_turn(mesh):
    x, label, sizes = run(mesh, 21, size=8)
    assert sizes == [8, 8, 5]
    np.testing.assert_array_equal(x[:, 0], np.arange(21))
    np.testing.assert_array_equal(x[:, 1], label)
    np.testing.assert_array_equal(label, np.arange(21) % 3)
    np.testing.assert_array_equal(x[:, 2], 5)


def test_a_batch_is_rounded_up_to_the_mesh(mesh):
    assert run(mesh, 21, size=5)[2] == [8, 8, 5]
    assert run(mesh, 3, size=64)[2] == [3]


def test_a_stream_can_begin_in_the_middle(mesh):
    whole, rest = run(mesh, 21)[0], run(mesh, 21, start=8)[0]
    np.testing.assert_array_equal(whole[8:], rest)


def test_sobol_noise_is_normal_and_evenly_spread(mesh):
    z = run(mesh, 256, size=64, sobol=True, shape=(2, 3))[0]
    assert z.shape == (256, 2, 3) and z.dtype == np.float32
    flat = np.sort(z.reshape(256, 6), axis=0)
    from scipy import special

    # A (0, m, 1) net in each coordinate: one of the 256 points in each 256th part.
    parts = np.floor(special.ndtr(flat.astype(np.float64)) * 256)
    np.testing.assert_array_equal(parts, np.arange(256)[:, None] + np.zeros(6))
    again = run(mesh, 256, start=64, size=64, sobol=True, shape=(2, 3))[0]
    np.testing.assert_array_equal(z[64:], again)
    other = run(mesh, 256, size=64, sobol=True, shape=(2, 3), seed=6)[0]
    assert not np.array_equal(z, other)


@pytest.mark.parametrize("rows", [1, 8, 13])
def test_apply_returns_the_rows_it_was_given_whatever_the_mesh(mesh, rows):
    apply = inference.make_apply(mesh, 10.0)
    x = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    params = {"w": np.float32([2.0, 3.0, 4.0])}

    def function(params, x):
        return {"scaled": x * params["w"], "sum": x.sum(1)}

    with jax.set_mesh(mesh):
        found = apply(function, params, x)
    np.testing.assert_array_equal(found["scaled"], x * params["w"])
    np.testing.assert_allclose(found["sum"], x.sum(1), rtol=1e-6)
    assert isinstance(found["sum"], np.ndarray)


def test_apply_compiles_once_per_function_and_takes_other_parameters(mesh):
    apply, traced = inference.make_apply(mesh, 10.0), []

    def function(params, x):
        traced.append(x.shape)
        return x * params

    x = np.ones((8, 2), np.float32)
    with jax.set_mesh(mesh):
        for scale in (2.0, 2.0, 3.0):
            np.testing.assert_array_equal(apply(function, np.float32(scale), x), scale)
    assert traced == [(8, 2)]


def test_digest_of_parameters_changes_with_every_bit_and_place(mesh):
    w = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    params = {"a": {"w": w, "b": np.zeros(3, np.float32)}}
    found = {inference.digest(params)}
    split = jax.device_put(params, sharding.replicated(mesh))
    split["a"]["w"] = jax.device_put(w, sharding.batch_sharding(mesh))
    assert inference.digest(split) in found
    other = w.copy()
    other[7, 5] = np.nextafter(other[7, 5], 9)
    for changed in (
        {"a": {"w": other, "b": np.zeros(3, np.float32)}},
        {"a": {"w": w[::-1].copy(), "b": np.zeros(3, np.float32)}},
        {"a": {"w": w, "b": np.float32([0, 0, -0.0])}},
        {"a": {"v": w, "b": np.zeros(3, np.float32)}},
        {"a": {"w": w.reshape(6, 8), "b": np.zeros(3, np.float32)}},
    ):
        found.add(inference.digest(changed))
    assert len(found) == 6
