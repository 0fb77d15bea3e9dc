import io

import pytest

from diffusionlab import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (123, "2:03"), (3723, "1:02:03"),
     (90_000, "25:00:00")],
)  # fmt: skip
def test_duration_reads(seconds, text):
    assert progress.duration(seconds) == text


@pytest.fixture
def clock(monkeypatch):
    """A clock from step 10 to 110, 8 examples a step, and the time it reads."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    rates = {"mfu": 1e9, "mfu_datasheet": 4e9}
    return progress.Clock(10, 110, 8, 2e8, rates), now


def test_figures_of_a_stretch(clock):
    clock, now = clock
    clock.waited(1.0)
    clock.waited(0.5)
    now[0] += 10.0
    # 20 steps in 10 s: half a second each, and 80 are left.
    assert clock.stretch(30) == pytest.approx(
        {
            "perf/examples_per_second": 16.0,
            "perf/data_wait": 0.15,
            "perf/eta_seconds": 40.0,
            # FLOPs / seconds per step / rate.
            "perf/mfu": 2e8 / 0.5 / 1e9,
            "perf/mfu_datasheet": 2e8 / 0.5 / 4e9,
        }
    )


def test_each_stretch_starts_anew_and_evaluation_is_no_training_time(clock):
    clock, now = clock
    clock.waited(1.0)
    now[0] += 10.0
    clock.stretch(30)
    clock.aside(90.0)
    now[0] += 100.0
    figures = clock.stretch(50)
    assert figures["perf/examples_per_second"] == pytest.approx(16.0)
    assert figures["perf/data_wait"] == 0.0
    assert figures["perf/eta_seconds"] == pytest.approx(30.0)


def test_stretch_of_no_steps_has_no_figures(clock):
    assert clock[0].stretch(10) == {}


def test_line_has_what_a_reader_looks_for(clock):
    clock, now = clock
    now[0] += 10.0
    figures = clock.stretch(30)
    assert progress.line(30, 110, 0.12345, figures, 50) == (
        "step 30/110 | loss 0.1235 | 16 examples/s | data wait 0% | mfu 40% | "
        "checkpoint at 50 | ETA 40 s"
    )
    assert "loss" not in progress.line(30, 110, None, figures, 50)
    assert progress.line(1, 110, 0.5, {}, 50) == (
        "step 1/110 | loss 0.5000 | checkpoint at 50"
    )


def test_elsewhere_than_on_a_terminal_every_line_is_clean():
    stream = io.StringIO()
    printer = progress.Printer(stream)
    printer.progress("one")
    printer.progress("two")
    printer.say("three")
    assert stream.getvalue() == "one\ntwo\nthree\n"


def test_terminal_line_is_rewritten_in_place_and_what_is_said_stays():
    stream = Terminal()
    printer = progress.Printer(stream)
    printer.progress("one")
    printer.progress("two")
    assert stream.getvalue() == "\r\x1b[Kone\r\x1b[Ktwo"
    printer.say("three")
    printer.say("four")
    assert stream.getvalue().endswith("two\nthree\nfour\n")
