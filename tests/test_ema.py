import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import ema


def track(average, values):
    """The average after each of `values`, in float64; the start is -100."""
    found, mean = [], -100.0
    rates = np.asarray(average.rate(np.arange(1, len(values) + 1)), np.float64)
    for rate, value in zip(rates, values, strict=True):
        mean = rate * mean + (1 - rate) * value
        found.append(mean)
    return np.array(found)


def trajectory(steps):
    k = np.arange(1, steps + 1)
    return np.exp(-k / (0.3 * steps)) + 0.3 * np.sin(k / (0.05 * steps))


def test_exponential_warms_up():
    average = ema.Exponential(decay=0.99)
    for step, rate in {
        1: 2 / 11,
        10: 11 / 20,
        890: 891 / 900,
        891: 0.99,
        9999: 0.99,
    }.items():
        np.testing.assert_allclose(average.rate(step), rate, rtol=1e-6)
    np.testing.assert_allclose(
        ema.Exponential(decay=0.99, warmup=False).rate(1), 0.99, rtol=1e-6
    )


def test_exponential_forgets_the_start():
    assert abs(track(ema.Exponential(decay=0.999), np.ones(40))[-1] - 1) < 1e-4


def test_update_is_exact_for_a_constant():
    tree = {"a": jnp.full(3, 0.1), "b": {"c": jnp.full(2, 1e-8)}}
    new = ema.update(tree, tree, jnp.float32(0.999))
    jax.tree.map(np.testing.assert_array_equal, new, tree)


def test_update_moves_by_one_minus_the_rate():
    new = ema.update({"a": jnp.zeros(2)}, {"a": jnp.ones(2)}, 0.75)
    np.testing.assert_allclose(new["a"], 0.25)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range_is_an_error(decay):
    with pytest.raises(ValueError, match="decay: must be in"):
        ema.Exponential(decay=decay)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 5.0, 16.97, 94.0])
def test_gamma_of_inverts_the_formula_of_the_width(gamma):
    sigma_rel = (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)
    assert ema.gamma_of(sigma_rel) == pytest.approx(gamma, rel=1e-9, abs=1e-6)


def test_gamma_of_has_the_values_of_the_paper():
    # Karras et al. (2024), section 3.1: gamma 6.94 for 0.10 and 16.97 for 0.05.
    assert ema.gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert ema.gamma_of(0.05) == pytest.approx(16.97, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3])
def test_width_out_of_range_is_an_error(sigma_rel):
    with pytest.raises(ValueError, match="sigma_rel: must be in"):
        ema.Power(sigma_rel=sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.25, 0.15, 0.10, 0.05])
def test_power_updates_are_the_sum_weighted_by_powers_of_the_step(sigma_rel):
    average, gamma = ema.Power(sigma_rel=sigma_rel), ema.gamma_of(sigma_rel)
    errors = []
    for steps in (500, 1000):
        values = np.linspace(0, 1, steps) ** 2
        weights = np.arange(1, steps + 1) ** gamma
        direct = (weights * values).sum() / weights.sum()
        errors.append(abs(track(average, values)[-1] - direct))
    # Of first order in 1/steps: twice the steps, half the error.
    assert errors[1] < 0.02 and errors[1] == pytest.approx(errors[0] / 2, rel=0.15)


def test_power_average_of_width_of_a_uniform_profile_is_the_mean():
    # gamma = 0: b = 1 - 1/k is the running mean, exactly.
    average = ema.Power(sigma_rel=(1 / 12) ** 0.5)
    values = trajectory(300)
    np.testing.assert_allclose(track(average, values)[-1], values.mean(), atol=1e-5)


def test_power_average_has_its_relative_width():
    sigma_rel = 0.1
    weights = np.array(
        [track(ema.Power(sigma_rel=sigma_rel), row)[-1] for row in np.eye(40)]
    )
    k = np.arange(1, 41)
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    deviation = (weights @ k**2 - (weights @ k) ** 2) ** 0.5
    assert deviation / 40 == pytest.approx(sigma_rel, rel=0.1)


def stored_averages(widths, at, values):
    tracks = {w: track(ema.Power(sigma_rel=w), values) for w in widths}
    stored = [(s, w) for s in at for w in widths]
    return stored, np.array([tracks[w][s - 1] for s, w in stored])


@pytest.mark.parametrize("sigma_rel", [0.08, 0.12, 0.15])
def test_unseen_width_is_reconstructed(sigma_rel):
    values = trajectory(4000)
    stored, averages = stored_averages((0.05, 0.10), range(250, 4001, 250), values)
    truth = track(ema.Power(sigma_rel=sigma_rel), values)[-1]
    coefficients = ema.reconstruction(stored, 4000, sigma_rel)
    assert coefficients.sum() == pytest.approx(1, abs=0.02)
    error = abs(coefficients @ averages - truth)
    nearest = min(abs(averages[-2] - truth), abs(averages[-1] - truth))
    assert error < 0.005 and error < 0.2 * nearest


def test_average_at_an_earlier_step_is_reconstructed():
    values = trajectory(4000)
    stored, averages = stored_averages((0.05, 0.10), range(250, 4001, 250), values)
    truth = track(ema.Power(sigma_rel=0.12), values)[2999]
    coefficients = ema.reconstruction(stored, 3000, 0.12)
    assert abs(coefficients @ averages - truth) < 0.005


def test_stored_average_is_reconstructed_exactly():
    stored = [(s, w) for s in (1000, 2000, 4000) for w in (0.05, 0.10)]
    for i, (step, width) in enumerate(stored):
        coefficients = ema.reconstruction(stored, step, width)
        np.testing.assert_allclose(coefficients, np.eye(6)[i], atol=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.06, 0.07, 0.08, 0.09])
def test_two_averages_of_one_checkpoint_reach_every_width_between(sigma_rel):
    """As the configs keep them; an offset and a drift come through."""
    for values in (trajectory(4000), np.linspace(5, 6, 4000), np.full(4000, 7.0)):
        stored, averages = stored_averages((0.05, 0.10), (4000,), values)
        truth = track(ema.Power(sigma_rel=sigma_rel), values)[-1]
        coefficients = ema.reconstruction(stored, 4000, sigma_rel)
        assert coefficients.sum() == pytest.approx(1, abs=1e-12)
        assert abs(coefficients @ averages - truth) < 0.01


@pytest.mark.parametrize(
    ("widths", "at", "sigma_rel"),
    [
        ((0.05, 0.10), (4000,), 0.25),
        ((0.05, 0.10), (4000,), 0.02),
        ((0.10,), (4000,), 0.05),
        ((0.05,), range(1000, 4001, 1000), 0.1),
    ],
)
def test_width_out_of_reach_is_an_error_that_names_what_is(widths, at, sigma_rel):
    stored = [(s, w) for s in at for w in widths]
    with pytest.raises(ValueError, match=f"do not reach {sigma_rel}: .*%") as error:
        ema.reconstruction(stored, 4000, sigma_rel)
    said = str(error.value)
    named = ", ".join(f"{w:g}" for w in widths)
    assert f"Stored: sigma_rel {named}; checkpoints: {len(at)}, from" in said
    assert "config.checkpoint.keep_every" in said
    nearest = float(said.partition("width they reach is ")[2].partition(". ")[0])
    ema.reconstruction(stored, 4000, nearest)
    beyond = nearest + 0.002 * np.sign(sigma_rel - nearest)
    with pytest.raises(ValueError, match="do not reach"):
        ema.reconstruction(stored, 4000, beyond)


def test_a_step_long_after_the_last_checkpoint_is_out_of_reach():
    with pytest.raises(ValueError, match=r"from 100 to 100 updates") as error:
        ema.reconstruction([(100, 0.1)], 4000, 0.1)
    assert "nearest" not in str(error.value)


def test_nothing_stored_is_an_error():
    with pytest.raises(ValueError, match="sigma_rel: there is no stored average"):
        ema.reconstruction([], 4000, 0.1)


def test_distance_is_that_of_the_profiles():
    stored, grid = [(2, 0.1), (5, 0.2)], (np.arange(100_000) + 0.5) / 100_000 * 5
    wanted, *profiles = (
        np.where(
            grid <= end,
            (ema.gamma_of(w) + 1) * (grid / end) ** ema.gamma_of(w) / end,
            0,
        )
        for end, w in ((5, 0.15), *stored)
    )
    coefficients, distance = ema._combination(stored, 5, 0.15)
    off = coefficients @ np.array(profiles) - wanted
    assert distance == pytest.approx(
        (off**2).mean() ** 0.5 / (wanted**2).mean() ** 0.5, rel=1e-3
    )


def test_inner_products_are_those_of_the_profiles():
    grid = (np.arange(200_000) + 0.5) / 200_000 * 5
    for s, g, s2, g2 in ((2, 3.0, 5, 1.5), (5, 1.5, 2, 3.0), (4, 2.0, 4, 2.0)):
        p, p2 = (
            np.where(grid <= end, (a + 1) * grid**a / end ** (a + 1), 0)
            for end, a in ((s, g), (s2, g2))
        )
        assert ema._inner(s, g, s2, g2) == pytest.approx((p * p2).mean() * 5, rel=1e-3)
