"""The learned weighting of EDM2, where its best answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusionlab.models.network import as_network
from diffusionlab.models.uncertainty import Uncertainty
from diffusionlab.objectives import weightings
from diffusionlab.objectives.denoising import (
    Denoising,
)
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.importance import Importance
from diffusionlab.schedules.times import Discrete
from diffusionlab.types import DataSpec, Inputs, Network

LEVELS, STD = 4, 0.5
ROLES = ("denoiser", "uncertainty")


def by_level(params, cond):
    """The parameter of each example's noise level, `[B]`."""
    return params[jnp.round(cond["t"] * (LEVELS - 1)).astype(jnp.int32)]


def learned(**changes):
    """A linear denoiser and u, each with a parameter for each of four noise levels."""

    def linear(params, z, cond, *, train=False, key=None):
        return by_level(params, cond)[:, None] * z

    def u(params, z, cond, *, train=False, key=None):
        assert train and set(cond) == {"t", "logsnr"}
        return by_level(params, cond)

    networks = {
        "denoiser": Network(None, linear, ()),
        "uncertainty": Network(None, u, ()),
    }
    arguments = {
        "process": Gaussian(schedule=Cosine(logsnr_min=-6.0), prediction="eps"),
        "networks": networks,
        "spec": DataSpec(shape=(64,)),
        "weighting": weightings.V(),
        "times": Discrete(num_timesteps=LEVELS),
        "learned_weighting": True,
    }
    return Denoising(**(arguments | changes))


def gaussian_inputs(batch_size):
    x = STD * jax.random.normal(jax.random.key(100), (batch_size, 64))
    return Inputs({"x": x}, jax.random.key(0), jnp.int32(0), {}, {})


def exact(process):
    """The best factor on z and the smallest mean eps error at each level."""
    t = jnp.arange(LEVELS) / (LEVELS - 1)
    alpha, sigma = process.schedule.alpha_sigma(t)
    total = (alpha * STD) ** 2 + sigma**2
    return sigma / total, (alpha * STD) ** 2 / total, t


def test_the_learned_weighting_adds_a_role_to_the_phase():
    it = learned()
    assert tuple(it.roles) == it.phases["train"].trains == ROLES
    assert it.roles["uncertainty"].ema == ()
    assert it.samples_from == ("denoiser",)
    assert "uncertainty" not in learned(learned_weighting=False).roles


def test_the_best_uncertainty_is_the_log_of_the_weighted_error():
    it = learned()
    factor, error, t = exact(it.process)
    best = jnp.log(it.weighting(it.process.schedule, t) * error)
    params = {"denoiser": factor, "uncertainty": best}
    given = gaussian_inputs(1 << 12)
    grad, metrics = jax.jit(jax.grad(it.loss, has_aux=True))(params, given)
    # A level's slope is (1 - mean of E / its expectation) / 4, over 64 * 2^10 squares.
    tolerance = 5 * (2 / (64 << 10)) ** 0.5 / LEVELS
    np.testing.assert_allclose(grad["uncertainty"], 0.0, atol=tolerance)
    # Then the loss is 1 + the mean of u, which is log E.
    loss = metrics["loss"][0] / metrics["loss"][1]
    assert float(loss) == pytest.approx(1 + float(best.mean()), abs=tolerance)
    # And away from it u is pulled back.
    for shift in (-0.1, 0.1):
        moved = params | {"uncertainty": best + shift}
        slope = jax.jit(jax.grad(it.loss, has_aux=True))(moved, given)[0]
        assert np.all(np.sign(slope["uncertainty"]) == np.sign(shift))


def test_training_the_network_of_the_uncertainty_reaches_it():
    it = learned()
    network = as_network(Uncertainty(spec=it.spec, dtype="float32", width=32), it.spec)
    it = learned(networks=it.networks | {"uncertainty": network})
    factor, error, t = exact(it.process)
    given = gaussian_inputs(512)
    start = network.init(jax.random.key(0))

    def loss(u):
        return it.loss({"denoiser": factor, "uncertainty": u}, given)[0]

    def step(state, _):
        u, optimizer = state
        updates, optimizer = tx.update(jax.grad(loss)(u), optimizer)
        return (optax.apply_updates(u, updates), optimizer), None

    tx = optax.adam(0.05)
    (trained, _), _ = jax.jit(
        lambda u: jax.lax.scan(step, (u, tx.init(u)), length=400)
    )(start)
    logsnr = it.process.schedule.logsnr(t)
    u = network.apply(trained, jnp.zeros((LEVELS, 64)), {"logsnr": logsnr})
    best = jnp.log(it.weighting(it.process.schedule, t) * error)
    # Five standard errors of the log of a mean over 64 * 128 squares.
    np.testing.assert_allclose(u, best, atol=5 * (2 / (64 << 7)) ** 0.5)


def test_the_learned_weighting_leaves_the_minimiser_where_it_was():
    it = learned()
    plain = learned(learned_weighting=False)
    u = jnp.array([0.5, -1.0, 2.0, 0.0])
    params = {"denoiser": jnp.array([0.1, 0.5, 1.0, 0.3]), "uncertainty": u}
    given = gaussian_inputs(64)
    grad, metrics = jax.jit(jax.grad(it.loss, has_aux=True))(params, given)
    base, expected = jax.jit(jax.grad(plain.loss, has_aux=True))(params, given)
    # The slope of each level's parameter is scaled by a positive number.
    scaled = np.exp(-u) * base["denoiser"]
    np.testing.assert_allclose(grad["denoiser"], scaled, rtol=1e-5)
    # What is reported without u is what it was.
    np.testing.assert_array_equal(metrics["weighted_error"], expected["loss"])
    np.testing.assert_array_equal(metrics["loss_by_logsnr"], expected["loss_by_logsnr"])
    assert "weighted_error" not in expected


def test_the_weight_of_a_time_multiplies_the_whole_of_equation_3():
    law = Importance(weighting=weightings.Elbo(), floor=0.3)
    constant = Network(None, lambda params, z, cond, **_: 0.7 + 0.0 * cond["t"], ())
    networks = learned().networks | {"uncertainty": constant}
    it = learned(times=law, networks=networks)
    given, params = gaussian_inputs(64), dict.fromkeys(ROLES, jnp.ones(LEVELS))
    loss, metrics = jax.jit(it.loss)(params, given)
    key = jax.random.fold_in(given.key, 0)
    _, weight = jax.jit(lambda k: law.sample(k, 64, it.process.schedule))(key)
    error, count = metrics["weighted_error"]
    expected = np.exp(-0.7) * error / count + 0.7 * weight.mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert abs(float(weight.mean()) - 1) > 1e-4
