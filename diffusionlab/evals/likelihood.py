"""Bits per dimension: a variational bound, and the likelihood of the ODE.

The bound, in continuous time, with lambda = logsnr and D dimensions:

    -log p(x) <= 1/2 int E |eps - eps_hat|² d lambda                                (1)
                 + KL(N(alpha_1 x, sigma_1² I) || N(0, q_1 I))                      (2)
                 + E[-log p(x | z_0)],   p(x | z_0) = N(z_0 / alpha_0, 1/SNR_0)     (3)

with q = alpha² d² + sigma² for data of variance d². (3) is (D / 2) (log(2 pi e) -
lambda_0); for the exact denoiser the bound is tight as the ends of lambda go to
infinity. For x in {v_k}, (3) is instead that of p(x | z_0) proportional to
N(v_k; z_0 / alpha_0, 1/SNR_0).

The ODE, in the angle theta = arctan(sigma / (alpha d)) and w = z / sqrt(q):

    dw / d theta = cos(theta) eps_hat - sin(theta) x_hat / d                        (4)
    log p(x) = log N(w_1) + int_0^1 div (4) + D log(alpha_0 / sqrt(q_0)),
    d log p(w) / d theta = -div (4)                                                 (5)

so data N(0, d² I) do not move at all. Equal steps in logsnr, of which the slope
d theta / d lambda = -sin(theta) cos(theta) / 2 vanishes at both ends; Runge and Kutta's
method of order 4. For integers, x + u with u uniform over the distance of two levels
bounds the probability of x from below.

The flow starts at z_0 = alpha_0 x: p in (5) is the density, at x, of data with the
noise of t = 0, x + (sigma_0 / alpha_0) eps. For gaussian data of variance c that makes
-log p(x) larger by (D - |x|² / c) / (2 c SNR_0) nats, to first order.

Source: Kingma et al. 2021, VDM (arXiv 2107.00630), equations 11 and 17 and appendix E;
Song et al. 2021 (arXiv 2011.13456), equation 39, with Hutchinson's estimate, equation
40; Theis, van den Oord and Bethge 2016 (arXiv 1511.01844), section 3.1, for u.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab import keys as keys_lib
from diffusionlab import types
from diffusionlab.evals import arrays
from diffusionlab.metrics.likelihood import bits_per_dim
from diffusionlab.types import Array, CondPredict, Process

_EXACT_UP_TO = 64  # dimensions, where num_probes is None
_PROBES = 8
_AT_ONCE = 16  # Jacobian-vector products of an exact divergence
_RK4 = ((0.0, 1.0), (0.5, 2.0), (0.5, 2.0), (1.0, 1.0))  # (where, 6 x weight)


def _cond(label: Array | None) -> dict[str, Array]:
    return {} if label is None else {"label": label}


def _keys(use: str, index: Array) -> Array:
    """Returns `[B]` keys: the same ones at every evaluation."""
    base = keys_lib.key(0, f"likelihood/{use}")
    return jax.vmap(jax.random.fold_in, (None, 0))(base, index)


def _normal_log_density(w: Array) -> Array:
    axes = tuple(range(1, w.ndim))
    return -0.5 * jnp.sum(w**2 + math.log(2 * math.pi), axes)


@functools.lru_cache(maxsize=16)
def bound(
    process: Process,
    num_times: int,
    levels: tuple | None = None,
    logsnr_max: float = math.inf,
):
    """Returns `f(predict, x, label, index) -> (diffusion, prior, reconstruction)`.

    All are `[B]` in nats. Times are stratified: one in each of `num_times` equal parts
    of the range of logsnr, at an offset that each example draws for itself.

    Args:
      process: of the network.
      num_times: network evaluations per example.
      levels: the values that an entry of x may take; None is continuous.
      logsnr_max: z_0 of the bound is the latent there, if it is before t = 0.
    """
    schedule = process.schedule

    def run(predict: CondPredict, x: Array, label: Array | None, index: Array):
        ends = [schedule.logsnr(jnp.float32(end)) for end in (0, 1)]
        ends[0] = jnp.minimum(ends[0], logsnr_max)
        span, size, shape = ends[0] - ends[1], x[0].size, x.shape[1:]
        keys = _keys("bound", index)
        fold = jax.vmap(jax.random.fold_in, (0, None))
        offset = jax.vmap(jax.random.uniform)(fold(keys, 0))
        axes = tuple(range(1, x.ndim))

        def normal(use):
            draw = functools.partial(jax.random.normal, shape=shape)
            return jax.vmap(draw)(fold(keys, use))

        def part(total, i):
            t = schedule.inverse(ends[1] + span * (i + offset) / num_times)
            eps = normal(i + 2)
            said = predict(process.mix(x, eps, t), t, _cond(label))
            return total + jnp.sum((eps - said.eps) ** 2, axes), None

        total, _ = jax.lax.scan(part, jnp.zeros(len(x)), jnp.arange(num_times))
        diffusion = 0.5 * span * total / num_times
        alpha, sigma = schedule.alpha_sigma(jnp.float32(1))
        variance = (alpha * process.sigma_data) ** 2 + sigma**2
        prior = 0.5 * jnp.sum(
            ((alpha * x) ** 2 + sigma**2) / variance - 1 - jnp.log(sigma**2 / variance),
            axes,
        )
        if levels is None:
            one = 0.5 * size * (math.log(2 * math.pi * math.e) - ends[0])
            return diffusion, prior, jnp.full_like(prior, one)
        seen = x + jnp.exp(-0.5 * ends[0]) * normal(1)
        values = jnp.asarray(levels, jnp.float32)
        score = lambda value: -0.5 * jnp.exp(ends[0]) * (seen - value) ** 2  # noqa: E731

        def add(log_total, value):
            return jnp.logaddexp(log_total, score(value)), None

        log_total, _ = jax.lax.scan(add, jnp.full_like(x, -jnp.inf), values)
        return diffusion, prior, jnp.sum(log_total - score(x), axes)

    return run


@functools.lru_cache(maxsize=16)
def flow(process: Process, num_steps: int, num_probes: int = 0, width: float = 0.0):
    """Returns `f(predict, x, label, index) -> log p(x)`, in nats.

    p is the density of data with the noise of t = 0, see equation 5. The result is
    `[1, B]` with the exact divergence, else `[num_probes, B]`, an unbiased estimate of
    the trace from each probe.

    Args:
      process: of the network.
      num_steps: of four network evaluations each, with their derivatives.
      num_probes: Rademacher vectors per example, one for all of its path; 0 takes one
        Jacobian-vector product per dimension.
      width: of the uniform noise that is added to x.
    """
    schedule, data_std = process.schedule, process.sigma_data

    def run(predict: CondPredict, x: Array, label: Array | None, index: Array):
        shape, size = x.shape[1:], x[0].size
        keys = _keys("flow", index)

        def angle(t):
            alpha, sigma = schedule.alpha_sigma(t)
            q = jnp.sqrt((alpha * data_std) ** 2 + sigma**2)
            return q, alpha * data_std / q, sigma / q

        def slope(w, logsnr):
            t = schedule.inverse(logsnr)
            q, cosine, sine = angle(t)
            said = predict(q * w, jnp.full(len(w), t), _cond(label))
            along = cosine * said.eps - sine / data_std * said.x
            return -0.5 * sine * cosine * along

        if num_probes:
            draw = functools.partial(jax.random.rademacher, shape=(num_probes, *shape))
            probes = jax.vmap(draw, out_axes=1)(keys).astype(jnp.float32)
        else:
            basis = jnp.eye(size, dtype=jnp.float32).reshape(size, 1, *shape)
            probes = jnp.broadcast_to(basis, (size, *x.shape))
        axes = tuple(range(1, x.ndim))

        def with_divergence(w, logsnr):
            change, push = jax.linearize(lambda w: slope(w, logsnr), w)

            def along(probe):
                return jnp.sum(probe * push(probe), axes)

            found = jax.lax.map(along, probes, batch_size=min(len(probes), _AT_ONCE))
            return change, found if num_probes else jnp.sum(found, 0, keepdims=True)

        if width:
            key = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
            draw = functools.partial(jax.random.uniform, shape=shape)
            x = x + width * (jax.vmap(draw)(key) - 0.5)
        ends = [schedule.logsnr(jnp.float32(end)) for end in (0, 1)]
        h = (ends[1] - ends[0]) / num_steps

        def body(state, i):
            w, gained = state
            total = jax.tree.map(jnp.zeros_like, state)
            slopes = total
            for where, weight in _RK4:
                at = w + h * where * slopes[0]
                slopes = with_divergence(at, ends[0] + h * (i + where))
                total = jax.tree.map(lambda a, b, c=weight: a + c * b, total, slopes)
            return (w + h / 6 * total[0], gained + h / 6 * total[1]), None

        alpha, _ = schedule.alpha_sigma(jnp.float32(0))
        q, _, _ = angle(jnp.float32(0))
        rows = num_probes or 1
        start = (alpha / q * x, jnp.zeros((rows, len(x))))
        (w, gained), _ = jax.lax.scan(body, start, jnp.arange(num_steps))
        # The density of a moving point falls by the divergence, so going back adds it.
        return _normal_log_density(w) + gained + size * jnp.log(alpha / q)

    return run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood:
    """The bound and the likelihood of the ODE, on held-out examples, unguided.

    Numbers; `_bits` are per dimension, `_error` is the standard error of the same over
    the examples:

      bound_nats, bound_bits, bound_error: upper bound of -log p(x), its three terms in
        bits per dimension as `bound_diffusion`, `bound_prior`, `bound_reconstruction`.
      flow_nats, flow_bits, flow_error: -log p(x) of the probability-flow ODE, where p
        is of data with the noise of t = 0, see equation 5; where the divergence is
        estimated, `probe_error` is the part of flow_error due to it.

    Attributes:
      num_examples: held-out examples, at most.
      batch_size: of them at a time.
      bound, flow: which of the two to compute.
      num_times: network evaluations per example for the bound.
      num_steps: of the ODE solver, four evaluations each. For a mixture of narrow
        gaussians the largest error of an example is 1e-4 nats at 128, 3e-3 at 64.
      num_probes: vectors that estimate the divergence; 0 is exact, with as many
        Jacobian-vector products as dimensions; None is 0 up to 64 dimensions, else 8.
      levels: evenly spaced values from -1 to 1 that an entry of x can take: 256 for
        images of 8 bits. The numbers are then of probabilities; None: of densities.
        The bound pays for what the network says at noise far below a level.
      logsnr_max: where the bound ends, if that is before t = 0; any end above that
        of t = 1 is a bound. With levels, 2 log(1.5 (levels - 1)) leaves them just
        apart.
      conditional: on the label; else with the null label, for networks trained on it.
      every: steps between evaluations; 0 is at the end only.
    """

    num_examples: int = 1000
    batch_size: int = 250
    bound: bool = True
    flow: bool = True
    num_times: int = 32
    num_steps: int = 128
    num_probes: int | None = None
    levels: int | None = None
    logsnr_max: float | None = None
    conditional: bool = True
    every: int = 0

    def __post_init__(self):
        for name in ("num_examples", "batch_size", "num_times", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: must be at least 1, got {getattr(self, name)}."
                )
        if self.num_probes is not None and self.num_probes < 0:
            raise ValueError(
                f"num_probes: must not be negative, got {self.num_probes}."
            )
        if self.levels is not None and self.levels < 2:
            raise ValueError(f"levels: must be at least 2, got {self.levels}.")
        if not (self.bound or self.flow):
            raise ValueError("bound, flow: at least one of the two must be True.")

    @property
    def needs_null_label(self) -> bool:
        """Whether the network must have been trained without labels, too."""
        return not self.conditional

    def check_process(self, process: Process) -> None:
        """Raises ValueError unless the bound ends before noise of t = 1."""
        low, high = (float(process.schedule.logsnr(np.float32(t))) for t in (1, 0))
        if self.logsnr_max is not None and not self.logsnr_max > low:
            raise ValueError(
                f"logsnr_max: must be above {low:.4g}, the schedule's at t = 1 (it has "
                f"{high:.4g} at t = 0), got {self.logsnr_max}."
            )

    def check(self, source: types.Source) -> None:
        """Raises ValueError unless the examples have the stated levels."""
        if self.levels is None:
            return
        x = arrays.spread(source, 100)["x"]
        steps = (np.asarray(x, np.float64) + 1) * (self.levels - 1) / 2
        inside = steps.min() > -0.01 and steps.max() < self.levels - 0.99
        if not inside or np.abs(steps - np.round(steps)).max() > 0.01:
            raise ValueError(
                f"levels: the data are not {self.levels} evenly spaced values from -1 "
                "to 1; give their number, or None for data with a density."
            )

    def __call__(self, context: types.EvalContext) -> types.EvalResult:
        self.check(context.test)
        self.check_process(context.process)
        test = arrays.spread(context.test, self.num_examples)
        x, label = np.asarray(test["x"], np.float32), None
        if context.spec.num_classes:
            label = np.asarray(test["label"], np.int32)
            if not self.conditional:
                label = np.full_like(label, context.spec.num_classes)
        numbers, dimension = {}, int(np.prod(context.spec.shape))
        notes = {"data": f"{len(x)} held-out examples, {dimension} dimensions"}
        if self.bound:
            values = self._values
            end = math.inf if self.logsnr_max is None else self.logsnr_max
            function = bound(context.process, self.num_times, values, end)
            parts = self._batches(context, function, x, label)
            numbers |= _summary("bound", parts.sum(0), dimension)
            for name, part in zip(
                ("diffusion", "prior", "reconstruction"), parts, strict=True
            ):
                numbers[f"bound_{name}"] = float(bits_per_dim(part.mean(), dimension))
        if self.flow:
            probes = self.num_probes
            if probes is None:
                probes = 0 if dimension <= _EXACT_UP_TO else _PROBES
            width = 2 / (self.levels - 1) if self.levels else 0.0
            function = flow(context.process, self.num_steps, probes, width)
            log_p = self._batches(context, function, x, label)
            if self.levels:
                log_p = log_p + dimension * math.log(width)
            numbers |= _summary("flow", -log_p.mean(0), dimension)
            logsnr = float(context.process.schedule.logsnr(np.float32(0)))
            how = f"from {probes} probes per example" if probes else "exact"
            notes["flow"] = (
                f"divergence {how}; density of data with the noise of t = 0, "
                f"logsnr {logsnr:.4g}"
            )
            if probes > 1:
                within = log_p.var(0, ddof=1).mean() / probes
                error = math.sqrt(within / len(x))
                numbers["probe_error"] = float(bits_per_dim(error, dimension))
        return types.EvalResult(numbers, notes)

    @property
    def _values(self) -> tuple | None:
        if self.levels is None:
            return None
        return tuple(float(v) for v in np.linspace(-1, 1, self.levels))

    def _batches(self, context, function, x, label) -> np.ndarray:
        """Results `[K, N]` float64 in batches of one size, the last one padded."""
        size, found = min(self.batch_size, len(x)), []
        for start in range(0, len(x), size):
            rows = np.minimum(np.arange(start, start + size), len(x) - 1)
            some = None if label is None else label[rows]
            done = context.compute(function, x[rows], some, rows.astype(np.int32))
            found.append(np.asarray(done, np.float64))
        return np.concatenate(found, axis=1)[:, : len(x)]


def _summary(name: str, nats: np.ndarray, dimension: int) -> dict[str, float]:
    error = nats.std(ddof=1) / math.sqrt(len(nats)) if len(nats) > 1 else math.inf
    return {
        f"{name}_nats": float(nats.mean()),
        f"{name}_bits": float(bits_per_dim(nats.mean(), dimension)),
        f"{name}_error": float(bits_per_dim(error, dimension)),
    }
