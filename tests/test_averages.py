"""Names of averages; what is restored by them is in `test_restore.py`."""

import pytest

from diffusionlab import averages, ema

KEPT = {"main": ema.Exponential(decay=0.9), "wide": ema.Power(sigma_rel=0.1)}


@pytest.mark.parametrize("name", ["none", "main", "wide", "sigma_rel=0.07"])
def test_an_average_that_can_be_had_is_accepted(name):
    averages.check(KEPT, name, "config.x.ema")


@pytest.mark.parametrize(
    ("kept", "name", "said"),
    [
        (KEPT, "mian", "no average 'mian'; there are: main, wide, none; or sigma_rel"),
        (KEPT, "", "no average ''; there are"),
        ({}, "main", "no average 'main'; there are: none;"),
        (KEPT, "sigma_rel=", "expected sigma_rel=WIDTH with a number"),
        (KEPT, "sigma_rel=0.5", r"sigma_rel: must be in \(0, "),
        (
            {"main": KEPT["main"]},
            "sigma_rel=0.07",
            "'sigma_rel=0.07' is reconstructed from an average 'power', and the run "
            "keeps none; there are: main, none",
        ),
    ],
)
def test_another_name_is_an_error_of_the_key_that_says_it(kept, name, said):
    with pytest.raises(ValueError, match=f"^config.x.ema: {said}"):
        averages.check(kept, name, "config.x.ema")


def test_the_width_is_the_number():
    assert averages.width("sigma_rel=0.07", "--ema") == 0.07
    assert averages.is_reconstructed("sigma_rel=0.07")
    assert not averages.is_reconstructed("wide")
