"""EM distillation finds the mode of the teacher that its student does not know.

Teacher and student are exact: the student's samples are those of a grid of quantiles,
each a narrow gaussian, which makes the score of a mixture.
"""

import jax
import jax.numpy as jnp
import known_scores as scores
import numpy as np
import optax
import pytest
import toys
from scipy import stats

from diffusionlab.distillation.em_distillation import EmDistillation
from diffusionlab.models import analytic
from diffusionlab.types import DataSpec, Network, Prediction, Teacher

MODES = jnp.float32([[-2.0], [2.0]])
QUANTILES = stats.norm.ppf((np.arange(64) + 0.5) / 64)[:, None].astype(np.float32)


def exact(z_t, t, means, std):
    scales = scores.PROCESS.schedule.alpha_sigma(t)
    number = len(means)
    variances = jnp.full((number, 1), std**2)
    return Prediction(
        *analytic.denoise(z_t, *scales, jnp.zeros(number), means, variances)
    )


def generate(params, z):
    return jnp.tanh(z @ params["in"] + params["shift"]) @ params["out"] + params["mean"]


def on_one_mode(key):
    keys = jax.random.split(key, 3)
    return {
        "in": 1.5 * jax.random.normal(keys[0], (1, 16)),
        "shift": jax.random.normal(keys[1], (16,)),
        "out": 0.02 * jax.random.normal(keys[2], (16, 1)),
        "mean": MODES[0],
    }


def apply(params, z, cond, *, train=False, key=None):
    """The student, or the score network of samples."""
    if "samples" in params:
        return exact(z, cond["t"], params["samples"], 0.05).x
    return generate(params, z)


class Noisy:
    """Uniform away from the clean end, where alpha / sigma is large."""

    def sample(self, key, batch_size, schedule):
        t = jax.random.uniform(key, (batch_size,), minval=0.02)
        return t, jnp.ones(batch_size)


def share_of_the_other_mode(number, keys):
    """Returns the share of samples beyond 0 after training with K = `number`."""
    objective = scores.make(
        EmDistillation,
        networks={"denoiser": Network(on_one_mode, apply, ())},
        spec=DataSpec((1,)),
        teacher=Teacher(lambda params, z, t, cond: exact(z, t, MODES, 0.2), False),
        times=Noisy(),
        num_langevin_steps=number,
        gamma_z=0.03,
        noise_power=1.0,
    )
    optimizer = optax.adam(1e-2)

    def train(key):
        def body(state, step):
            params, opt_state = state
            samples = generate(params, QUANTILES)
            known = {"student": params, "aux": {"samples": samples}}
            here = jax.random.fold_in(key, step)
            inputs = toys.inputs(jnp.zeros((64, 1)), here, params=known)
            loss = lambda p: objective.loss({"student": p}, inputs)[0]  # noqa: E731
            change, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
            return (optax.apply_updates(params, change), opt_state), None

        params = on_one_mode(key)
        state = params, optimizer.init(params)
        params = jax.lax.scan(body, state, jnp.arange(500))[0][0]
        return jnp.mean(generate(params, QUANTILES) > 0)

    return np.asarray(jax.jit(jax.vmap(train))(keys))


# Section 13, item 9.
@pytest.mark.slow
def test_langevin_steps_reach_the_other_mode():
    keys = jax.random.split(jax.random.key(0), 4)
    none, one, eight = (share_of_the_other_mode(k, keys) for k in (0, 1, 8))
    assert np.all(eight >= one) and np.all(eight >= none)
    # Half of the samples belong there.
    assert np.median(eight) > 0.3 and max(*none, *one) < 0.1
