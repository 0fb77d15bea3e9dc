"""The schedules of the learning rate: values at exact points, and what they refuse."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import registry


def schedule(name, **kw):
    return registry.build("learning_rate", dict(name=name, **kw), "config.x")


@pytest.mark.parametrize(
    "name, options, points",
    [
        ("constant", {}, {0: 0.4, 99: 0.4}),
        ("constant", dict(warmup_steps=4), {0: 0.1, 1: 0.2, 3: 0.4, 4: 0.4, 9: 0.4}),
        ("constant", dict(warmup_steps=1), {0: 0.4, 1: 0.4}),
        ("linear", dict(decay_steps=8), {0: 0.4, 2: 0.3, 8: 0.0, 99: 0.0}),
        ("linear", dict(decay_steps=8, warmup_steps=4, final_value=0.2),
         {0: 0.1, 3: 0.4, 4: 0.4, 6: 0.3, 8: 0.2, 99: 0.2}),
        ("cosine", dict(decay_steps=8), {0: 0.4, 4: 0.2, 8: 0.0, 99: 0.0}),
        ("cosine", dict(decay_steps=12, warmup_steps=4, final_value=0.2),
         {0: 0.1, 3: 0.4, 4: 0.4, 8: 0.3, 12: 0.2, 99: 0.2}),
        ("inverse_sqrt", dict(warmup_steps=4), {0: 0.1, 3: 0.4, 4: 0.4, 16: 0.2}),
    ],
)  # fmt: skip
def test_schedule_has_its_value_at(name, options, points):
    rate = schedule(name, value=0.4, **options)
    for step, value in points.items():
        np.testing.assert_allclose(rate(jnp.int32(step)), value, atol=1e-7)


def test_every_schedule_is_finite_and_never_negative():
    required = dict(value=0.3, decay_steps=20, warmup_steps=5)
    for name in registry.table("learning_rate"):
        accepted = registry.parameters(registry.table("learning_rate")[name])
        rate = schedule(name, **{k: v for k, v in required.items() if k in accepted})
        values = np.array([rate(jnp.int32(step)) for step in range(0, 60, 3)])
        assert np.isfinite(values).all() and (values >= 0).all(), name
        assert values.max() <= 0.3 + 1e-6, name


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_decay_must_be_longer_than_warm_up(name):
    with pytest.raises(ValueError, match="config.x.decay_steps: must exceed warmup"):
        schedule(name, value=1.0, decay_steps=4, warmup_steps=4)


def test_inverse_sqrt_needs_warm_up():
    with pytest.raises(ValueError, match="config.x.warmup_steps: must be at least 1"):
        schedule("inverse_sqrt", value=1.0, warmup_steps=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decay_steps", 2),
        ("warmup_steps", -1),
        ("final_value", -0.1),
        ("final_value", float("nan")),
        *(("value", value) for value in (0, 0.0, -1.0, float("nan"), float("inf"))),
    ],
)
def test_every_schedule_checks_its_numbers(name, value):
    given = dict(value=0.3, decay_steps=8, warmup_steps=2) | {name: value}
    tried = 0
    for kind in registry.table("learning_rate"):
        accepted = registry.parameters(registry.table("learning_rate")[kind])
        if name in accepted:
            with pytest.raises(ValueError, match=f"^config.x.{name}: must "):
                schedule(kind, **{k: v for k, v in given.items() if k in accepted})
            tried += 1
    assert tried >= 2
