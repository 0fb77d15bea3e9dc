"""Which parameters are restored; that they are restored is in `integration/`."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import ema, restore
from diffusionlab.types import Phase

POWERS = {"short": ema.Power(sigma_rel=0.05), "long": ema.Power(sigma_rel=0.10)}
STEPS = range(250, 4001, 250)


class Alternating:
    """The student rests for long at first, and then trains two steps in three."""

    samples_from = ("student", "aux")
    phases = {
        "aux": Phase(trains=("aux",), loss=None),
        "student": Phase(trains=("student",), loss=None),
        "both": Phase(trains=("student", "aux"), loss=None),
    }

    def phase(self, step):
        if step < 1000:
            return "aux" if step >= 100 else "both"
        return ("student", "aux", "both")[step % 3]


class Stored:
    """Checkpoints of one number per role, and of its averages."""

    def __init__(self, steps=STEPS):
        self.saved, self.read = {}, []
        objective, counts = Alternating(), dict.fromkeys(Alternating.samples_from, 0)
        averages = {
            (n, role): np.float64(9) for n in (*POWERS, "wanted") for role in counts
        }
        powers = POWERS | {"wanted": ema.Power(sigma_rel=0.08)}
        rates = {
            n: np.asarray(p.rate(np.arange(1, 4001)), float) for n, p in powers.items()
        }
        for step in range(4000):
            value = np.sin(step / 300) + step / 4000
            for role in objective.phases[objective.phase(step)].trains:
                for n in powers:
                    rate = rates[n][counts[role]]
                    old = averages[n, role]
                    averages[n, role] = old + (1 - rate) * (value - old)
                counts[role] += 1
            if step + 1 in steps:
                self.saved[step + 1] = (value, dict(averages), dict(counts))

    def steps(self):
        return list(self.saved)

    def restore_part(self, step, part):
        self.read.append(step)
        value, averages, _ = self.saved[step]
        return {
            "params": {
                role: {"w": jnp.float32(value)} for role in part.get("params", ())
            },
            "ema": {
                n: {role: {"w": jnp.float32(averages[n, role])} for role in roles}
                for n, roles in part.get("ema", {}).items()
            },
        }


@pytest.fixture(scope="module")
def stored():
    return Stored()


@pytest.fixture
def setting(monkeypatch):
    """`setting(kept)`: an experiment whose averages are kept for these roles."""

    def make(kept=("student", "aux")):
        state = types.SimpleNamespace(
            params=dict.fromkeys(Alternating.samples_from, {}),
            ema={n: dict.fromkeys(kept, {}) for n in POWERS},
        )
        monkeypatch.setattr(restore.state_lib, "abstract", lambda *_: state)
        return types.SimpleNamespace(
            objective=Alternating(), ema=POWERS, references=(), teacher=None
        )

    return make


def test_updates_of_a_role_are_those_of_its_phases(setting, stored):
    for role in Alternating.samples_from:
        found = restore._updates(setting(), role, stored.steps())
        assert found == {s: counts[role] for s, (*_, counts) in stored.saved.items()}


@pytest.mark.parametrize("step", [2000, 4000])
def test_reconstruction_runs_on_the_updates_of_each_role(setting, stored, step):
    found = restore.restore(setting(), stored, step, "sigma_rel=0.08", None)
    for role in ("student", "aux"):
        truth = stored.saved[step][1]["wanted", role]
        assert found[role]["w"] == pytest.approx(truth, abs=2e-3), role


def test_role_without_an_average_comes_as_it_is(setting, stored):
    found = restore.restore(setting(("student",)), stored, 2000, "sigma_rel=0.08", 0)
    assert found["aux"]["w"] == np.float32(stored.saved[2000][0])
    truth = stored.saved[2000][1]["wanted", "student"]
    assert found["student"]["w"] == pytest.approx(truth, abs=2e-3)


def test_out_of_reach_is_an_error_of_the_flag(setting):
    with pytest.raises(ValueError, match="^--ema: role 'student', sigma_rel: the st"):
        restore.restore(setting(), Stored((4000,)), 4000, "sigma_rel=0.2", None)


def test_no_update_yet_is_an_error_of_the_flag(setting, stored):
    with pytest.raises(ValueError, match="^--ema: role 'student', .*no stored average"):
        restore.restore(setting(), stored, 100, "sigma_rel=0.08", None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "sigma_rel=abc",
            "expected sigma_rel=WIDTH with a number, got 'sigma_rel=abc'",
        ),
        ("sigma_rel=", "expected sigma_rel=WIDTH with a number"),
        ("sigma_rel=0.5", r"sigma_rel: must be in \(0, "),
        ("sigma_rel=nan", r"sigma_rel: must be in \(0, "),
        ("mian", "no average 'mian'; there are: short, long, none"),
    ],
)
def test_name_of_no_average_is_an_error_of_the_flag(setting, name, said):
    with pytest.raises(ValueError, match=f"^--ema: {said}"):
        restore.check_ema(setting(), name)
