"""Our masked diffusion against MD4, the JAX code of its authors, on the same logits.

A table of random numbers is the network of both. Compared are, for the same x and z_t:
the loss of continuous time and that of T steps but the last, nats per example; the law
of an ancestral step, and of one by top-p; the grid of the times. What is printed is the
largest difference, relative to the largest value of a row; their losses are in float64.

  git clone https://github.com/google-deepmind/md4 FOLDER   # commit b9fbf29 was used
  python benchmarks/peers/masked_diffusion.py FOLDER

Packages of theirs that need an older JAX, or are for distributions and pictures alone,
are replaced by what writes down the probabilities that would be drawn from.
"""

from __future__ import annotations

import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab import registry
from diffusionlab.objectives import discrete
from diffusionlab.samplers import tokens
from diffusionlab.types import CategoricalPrediction, DataSpec

for _name in (
    "tensorflow_probability",
    "tensorflow_probability.substrates",
    "tensorflow_probability.substrates.jax",
    "distrax",
    "seaborn",
):
    sys.modules[_name] = mock.MagicMock()

BATCH, LENGTH, VOCABULARY, STEPS = 64, 24, 17, 50
END, TOP_P = 1e-4, 0.9
SCHEDULES = {
    "linear": {"name": "alpha_linear"},
    "cosine": {"name": "alpha_cosine"},
    "poly3": {"name": "alpha_polynomial", "power": 3.0},
}
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.integers(VOCABULARY, size=(BATCH, LENGTH)))
OWN, OTHERS = (
    jnp.asarray(2 * RNG.standard_normal((VOCABULARY + 1, VOCABULARY)), jnp.float32)
    for _ in range(2)
)
PLACE = jnp.asarray(RNG.standard_normal((LENGTH, VOCABULARY)), jnp.float32)


def logits_of(z):
    """Any function of all tokens, `[B, L]` -> `[B, L, K]`."""
    own, others, place = (
        q.astype(jnp.result_type(float)) for q in (OWN, OTHERS, PLACE)
    )
    return own[z] + others[z].mean(axis=1, keepdims=True) + place


class Written:
    """In place of a distribution: keeps the probabilities, and draws nothing."""

    probabilities = None

    def __init__(self, probs):
        Written.probabilities = probs

    def sample(self, seed):
        return jnp.zeros(Written.probabilities.shape[:-1], jnp.int32)


def peer(md4, schedule: str, z=None, **options):
    """Their model with our network, and with z in place of its own noise."""

    class Model(md4.MD4):
        def predict_x(self, zt, t, cond=None, train=False):
            return logits_of(zt), {}

        def forward_sample(self, x, t):
            return z

    return Model(
        data_shape=(LENGTH,),
        vocab_size=VOCABULARY,
        noise_schedule_type=schedule,
        classes=0,
        timesteps=STEPS,
        **options,
    ).bind({}, rngs={"sample": jax.random.key(0)})


def difference(ours, theirs) -> float:
    """The largest difference over the largest value of each row."""
    pair = (np.asarray(q, np.float64) for q in (ours, theirs))
    ours, theirs = (q.reshape(len(q), -1) for q in pair)
    scale = np.maximum(np.abs(theirs).max(axis=1), 1e-30)
    return float((np.abs(ours - theirs).max(axis=1) / scale).max())


def compare(md4, name: str, block: dict) -> dict[str, float]:
    """Returns what is compared, and the difference."""
    spec = DataSpec((LENGTH,), num_tokens=VOCABULARY)
    block = {"name": "categorical", "schedule": {**block, "end": END}}
    process = registry.build("process", block, "process", spec=spec)

    def predict(z_t, t):
        return process.predict(logits_of(z_t), z_t, t)

    found = {}
    # Ours reveals all in the last step, theirs leaves 1 - alpha(0) to another loss.
    u = 1 / STEPS + (1 - 1 / STEPS) * (jnp.arange(BATCH) + 0.5) / BATCH
    for what, num in (("loss", 0), (f"loss of {STEPS} steps", STEPS)):
        t = discrete.chain_times(u, num)[0] if num else u
        key = jax.random.key(1)
        z_t, _ = process.corrupt(key, X, t)
        model = peer(md4, name, z_t, cont_time=not num)
        ours = discrete.nelbo(process, predict, key, X, u, num)
        with jax.enable_x64(True):
            theirs = model.diffusion_loss(np.asarray(u, np.float64), X)
        found[what] = difference(ours, theirs)

    laws = {}
    for i in range(0, STEPS, 7):
        for sampler, top_p in (("ancestral", 1.0), ("topp", TOP_P)):
            model = peer(md4, name, sampler=sampler, sampling_grid="uniform")
            t, s = 1 - i / STEPS, 1 - (i + 1) / STEPS
            z_t, _ = process.corrupt(jax.random.key(i), X, t)
            if not (hidden := np.asarray(z_t == VOCABULARY)).any():
                continue
            model.sample_step(jax.random.key(0), i, STEPS, z_t, topp=TOP_P)
            answer = predict(z_t, jnp.full(BATCH, t)).logits
            log_x = tokens.sharpened(answer, 1.0, top_p)
            left = process.leave_one_out(CategoricalPrediction(log_x), z_t, t)
            ours = jnp.exp(process.posterior(left, z_t, t, s))
            pair = ours[hidden], Written.probabilities[hidden]
            laws.setdefault(f"law of a step, {sampler}", []).append(difference(*pair))
    return found | {what: max(values) for what, values in laws.items()}


def grids(md4) -> float:
    """Of the times of the cosine grid."""
    grid = registry.build("grid", {"name": "cosine"}, "grid")
    model = peer(md4, "linear", sampling_grid="cosine")
    theirs = [model.get_sampling_grid(i, STEPS)[1] for i in range(STEPS)]
    return float(np.abs(np.asarray(grid(None, STEPS))[:-1] - np.asarray(theirs)).max())


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.path.insert(0, sys.argv[1])
    from md4.models.diffusion import md4

    md4.tfd.Categorical = Written
    for name, block in SCHEDULES.items():
        for what, value in compare(md4, name, block).items():
            print(f"{name}, {what}: {value:.1e}", flush=True)
    print(f"times of the cosine grid: {grids(md4):.1e}")


if __name__ == "__main__":
    main()
