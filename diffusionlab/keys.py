"""The only place where random keys are made.

A key is a function of (seed, stream, step, micro-batch), never state: nothing about
randomness has to be saved, and a resumed run draws what the unbroken one would have.
"""

import zlib

import jax


def key(seed: int, stream: str, step=0, micro=0) -> jax.Array:
    """Returns the typed key of a stream at a step.

    Args:
      seed: the run's seed.
      stream: what the randomness is for, for example 'loss' or 'init/denoiser'.
      step: finished optimiser steps, int or traced int32.
      micro: index of the micro-batch, int or traced int32.
    """
    stream_id = zlib.crc32(stream.encode()) & 0x7FFFFFFF
    base = jax.random.fold_in(jax.random.key(seed), stream_id)
    return jax.random.fold_in(jax.random.fold_in(base, step), micro)


def sample_keys(seed: int, indices) -> jax.Array:
    """Returns one key per sample index, `[B]`: sample i depends on (seed, i) only."""
    base = key(seed, "sample")
    return jax.vmap(lambda i: jax.random.fold_in(base, i))(indices)
