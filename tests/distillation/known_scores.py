"""Students whose scores are all known: x = theta eps, for N(0, c²) data."""

import dataclasses

import costs
import jax
import jax.numpy as jnp
import numpy as np
import toys

from diffusionlab.schedules.times import Uniform
from diffusionlab.types import DataSpec, Inputs, Network, Teacher

C, SIZE = 0.8, 8


@dataclasses.dataclass(frozen=True)
class Ended(toys.Cosine):
    """The cosine schedule with finite ends, which times and samplers look at."""

    def logsnr(self, t):
        return jnp.clip(super().logsnr(jnp.clip(t, 1e-6, 1 - 1e-6)), -25.0, 25.0)


PROCESS = dataclasses.replace(toys.PROCESS, schedule=Ended())
NODES = np.polynomial.hermite_e.hermegauss(24)


def _factor(t, c):
    alpha, _ = toys.PROCESS.schedule.alpha_sigma(t)
    return alpha * c**2 / toys.variance(t, c)


def denoiser():
    """x_hat = a z + E[x | z], with the expectation under N(0, c²): a student has c = 0
    and a = theta, its exact score network a = 0 and c = theta."""

    def apply(params, z, cond, *, train=False, key=None):
        return (params["a"] + _factor(cond["t"], params["c"])[:, None]) * z

    def features(params, z, cond):
        return apply(params, z, cond), z

    init = lambda key: {"a": jnp.float32(0), "c": jnp.float32(1)}  # noqa: E731
    return Network(init, apply, (), features)


def head():
    """The exact discriminator of N(0, data²) and N(0, fake²), times a strength."""

    def apply(params, z, cond, *, train=False, key=None):
        data, fake = (toys.variance(cond["t"], params[k]) for k in ("data", "fake"))
        square = (z**2).sum(axis=1) * (1 / fake - 1 / data)
        return params["strength"] * 0.5 * (square + SIZE * jnp.log(fake / data))

    one = jnp.float32(1)
    return Network(lambda key: dict(data=one, fake=one, strength=one), apply, ())


TEACHER = Teacher(
    lambda params, z, t, cond: toys.exact(z, t, params["denoiser"]["c"]), False
)


def make(cls, **fields):
    """An objective on the test bed; its student starts at t = 1, almost: z = eps."""
    fields = {"times": Uniform(), "first_logsnr": -20.0, **fields}
    networks = {"denoiser": denoiser(), "discriminator": head()}
    known = dict(process=PROCESS, networks=networks, spec=DataSpec((SIZE,)))
    return cls(**{**known, "teacher": TEACHER, **fields})


def evaluations(cls, phase, **fields):
    """What XLA counts for a phase, and what the objective says."""
    net = costs.wide()
    head = Network(
        lambda key: jnp.zeros(costs.WIDTH),
        lambda params, features, cond, **_: features @ params,
        (),
    )

    def predict(params, z, t, cond):
        return PROCESS.predict(net.apply(params, z, cond), z, t)

    networks = {"denoiser": net, "discriminator": head}
    teacher = Teacher(predict, has_null_label=True)
    spec = DataSpec((costs.SIZE,), num_classes=2)
    objective = make(cls, networks=networks, teacher=teacher, spec=spec, **fields)
    own = net.init(jax.random.key(0))
    found = {"student": own, "aux": own, "teacher": own}
    found["discriminator"] = head.init(None)
    given = inputs(found, size=16, dimension=costs.SIZE)
    given.batch["label"] = jnp.zeros(16, jnp.int32)
    counted = costs.network_evaluations(objective, phase, given)
    return counted, objective.evaluations[phase]


def params(theta, c=C):
    """Parameters of all roles for a student theta, with everything else exact."""
    theta, std = jnp.float32(theta), jnp.abs(jnp.float32(theta))
    zero = jnp.float32(0)
    return {
        "student": {"a": theta, "c": zero},
        "aux": {"a": zero, "c": std},
        "discriminator": {
            "data": jnp.float32(c), "fake": std, "strength": jnp.float32(1)
        },
        "teacher": {"denoiser": {"c": jnp.float32(c)}},
    }  # fmt: skip


def inputs(found, key=0, size=512, dimension=SIZE):
    """Inputs with data N(0, C²) and the pairs (noise, C noise)."""
    key = jax.random.key(key) if isinstance(key, int) else key
    noise = jax.random.normal(jax.random.key(99), (size, dimension))
    return Inputs({"x": C * noise, "noise": noise}, key, jnp.int32(0), found, {})


def slope(objective, theta, key=0, size=512, phase="student"):
    """d loss / d theta of the student, its score network and head being exact."""
    found = params(theta)
    loss = objective.phases[phase].loss
    grad = jax.grad(lambda p: loss(p, inputs(found, key, size))[0])
    return grad({"student": found["student"]})["student"]["a"]


def flow(objective, starts, rate, num_steps=300):
    """Returns theta after gradient descent from each start, everything else exact."""

    def one(start):
        def body(theta, i):
            key = jax.random.fold_in(jax.random.key(5), i)
            return theta - rate * slope(objective, theta, key, 64), None

        return jax.lax.scan(body, start, jnp.arange(num_steps))[0]

    return jax.jit(jax.vmap(one))(jnp.asarray(starts, jnp.float32))


def normal_grid(number=2):
    """Nodes `[n^number, number]` and weights of an expectation over N(0, I)."""
    nodes, weights = NODES
    weights = weights / weights.sum()
    grids = np.meshgrid(*[nodes] * number, indexing="ij")
    both = np.meshgrid(*[weights] * number, indexing="ij")
    return (
        jnp.asarray(np.stack([g.ravel() for g in grids], -1), jnp.float32),
        jnp.asarray(np.prod([w.ravel() for w in both], axis=0), jnp.float32),
    )
