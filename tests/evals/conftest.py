"""Contexts in which the network is the exact denoiser of a mixture of gaussians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import keys as keys_lib
from diffusionlab import types
from diffusionlab.models import analytic
from diffusionlab.samplers import base


class Source:
    """Draws of a mixture of isotropic gaussians; labels are components."""

    def __init__(self, means, std, number, seed, num_classes):
        rng = np.random.default_rng(seed)
        self.means, self.std = np.asarray(means, np.float64), std
        self.spec = types.DataSpec(self.means.shape[1:], num_classes)
        label = np.arange(number) % len(means)
        self.x = self.means[label] + std * rng.normal(size=(number, *self.spec.shape))
        self.x, self.label = self.x.astype(np.float32), label.astype(np.int32)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "label": self.label[index]}

    def log_density(self, x, label=None):
        """In float64, given the label or not; components are equally likely."""
        flat = np.reshape(x, (len(x), 1, -1)).astype(np.float64)
        means = self.means.reshape(1, len(self.means), -1)
        square = np.sum((flat - means) ** 2, -1) / self.std**2
        score = -0.5 * (square + flat.shape[-1] * np.log(2 * np.pi * self.std**2))
        if label is not None:
            return score[np.arange(len(x)), label]
        top = score.max(1, keepdims=True)
        return (top + np.log(np.mean(np.exp(score - top), 1, keepdims=True)))[:, 0]


def _context(process, means, std, *, num_classes=0, number=512, sampler=None):
    train, test = (Source(means, std, number, seed, num_classes) for seed in (0, 1))
    flat_means = jnp.asarray(train.means.reshape(len(means), -1), jnp.float32)

    def predict(z_t, t, cond):
        alpha, sigma = process.schedule.alpha_sigma(t)
        weights = jnp.zeros(len(flat_means))
        if num_classes:
            label = cond["label"][:, None]
            chosen = (label == jnp.arange(num_classes)) | (label == num_classes)
            weights = jnp.where(chosen, weights, -jnp.inf)
        variances = jnp.full_like(flat_means, std**2)
        z = z_t.reshape(len(z_t), -1)
        x, eps = analytic.denoise(z, alpha, sigma, weights, flat_means, variances)
        return types.Prediction(x.reshape(z_t.shape), eps.reshape(z_t.shape))

    @functools.partial(jax.jit, static_argnums=0)
    def call(function, *arrays):
        return function(predict, *arrays)

    def compute(function, *arrays, guided=False):
        return jax.device_get(call(function, *arrays))

    @functools.cache
    def drawing(chosen):
        def draw(predict, index, label):
            keys = keys_lib.sample_keys(0, index)
            plain = lambda z, t: predict(z, t, {"label": label})  # noqa: E731
            return base.sample(chosen, process, plain, keys, train.spec.shape)

        return draw

    def draw(number, chosen=None):
        index = np.arange(number, dtype=np.int32)
        label = index % max(num_classes, 1)
        return compute(drawing(chosen or sampler), index, label), label

    return types.EvalContext(
        step=1,
        spec=train.spec,
        train=train,
        test=test,
        draw=draw,
        loss=None,
        predict=None,
        compute=compute,
        process=process,
        sampler=sampler,
    )


@pytest.fixture(scope="session")
def exact_context():
    """`exact_context(process, means, std, **options)`; means `[K, ...]`."""
    return _context
