import itertools

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab import keys


def data(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_keys_differ_over_seed_stream_step_and_micro_batch():
    grid = itertools.product(
        (0, 1, 7), ("loss/train", "loss/aux", "init/a"), *[(0, 1, 2)] * 2
    )
    found = [data(keys.key(*point)) for point in grid]
    assert len(set(found)) == len(found) == 81


def test_key_is_a_function_of_its_arguments_and_typed():
    key = keys.key(3, "loss", 5, 2)
    assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    assert data(key) == data(keys.key(3, "loss", 5, 2))
    traced = jax.jit(lambda step, micro: keys.key(3, "loss", step, micro))(5, 2)
    assert data(traced) == data(key)


def test_sample_key_depends_on_seed_and_index_only():
    whole = jax.random.key_data(keys.sample_keys(4, jnp.arange(8)))
    part = jax.random.key_data(keys.sample_keys(4, jnp.array([5, 2])))
    np.testing.assert_array_equal(part, np.asarray(whole)[[5, 2]])
    assert len({tuple(k) for k in np.asarray(whole).tolist()}) == 8
    other = jax.random.key_data(keys.sample_keys(5, jnp.arange(8)))
    assert not {tuple(k) for k in np.asarray(other).tolist()} & {
        tuple(k) for k in np.asarray(whole).tolist()
    }
