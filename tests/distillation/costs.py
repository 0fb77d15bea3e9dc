"""Network evaluations of a phase, as XLA counts them on a network that is all cost."""

import jax
import jax.numpy as jnp

from diffusionlab.types import Network

SIZE, WIDTH, LAYERS = 1, 64, 4


def wide(width=WIDTH, num_layers=LAYERS):
    """A network of square layers for data `[B, SIZE]`: its evaluations cost alike.

    The few numbers at its ends cost nothing in comparison; it ignores cond.
    """

    def init(key):
        keys = jax.random.split(key, num_layers)
        square = [jax.random.normal(k, (width, width)) / width**0.5 for k in keys]
        return {"square": square, "in": jnp.ones((1, width)), "out": jnp.ones(width)}

    def features(params, z, cond):
        h = z @ params["in"]
        for layer in params["square"]:
            h = jnp.tanh(h @ layer)
        return (h @ params["out"])[:, None], h

    def apply(params, z, cond, *, train=False, key=None):
        return features(params, z, cond)[0]

    return Network(init, apply, (), features)


def flops(function, *args):
    """Returns what XLA counts in the compiled `function(*args)`; a loop counts once."""
    found = jax.jit(function).lower(*args).compile().cost_analysis()
    return (found[0] if isinstance(found, list) else found)["flops"]


def network_evaluations(objective, phase, inputs):
    """Returns network evaluations per example in a gradient of a phase's loss.

    Args:
      objective: its entry 'denoiser' of networks, and its teacher's, is `wide()`.
      phase: its name.
      inputs: batch with 'x' `[B, SIZE]`, and parameters of all roles.
    """
    loss, trains = objective.phases[phase].loss, objective.phases[phase].trains
    params, x = inputs.params, inputs.batch["x"]

    def gradients(params, batch):
        frozen = inputs._replace(batch=batch, params=jax.lax.stop_gradient(params))
        own = {name: params[name] for name in trains}
        return jax.grad(loss, has_aux=True)(own, frozen)

    net = objective.networks["denoiser"]
    one = flops(lambda p, z: net.apply(p, z, {}), params["student"], x)
    return flops(gradients, params, inputs.batch) / one
