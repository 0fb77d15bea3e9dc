import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from diffusionlab import curves, pictures, report, workdir

NASTY = "</script><script>document.title='pwned'</script>"


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def run(tmp_path):
    """A run directory with everything in it, and text that must be escaped."""
    workdir = tmp_path / "a <run>"
    rng = np.random.default_rng(0)
    write(workdir / "config.json", {"seed": 0, "data": {"source": {"name": NASTY}}})
    write(workdir / "environment.json", [{"jax": "0.10"}, {"jax": "0.11"}])
    rows = [
        {
            "step": step,
            "train/loss": "nan" if step == 30 else 1 / step,
            "train/learning_rate": 1e-3,
            "train/loss_by_logsnr": [step / (i + 1) for i in range(10)],
            f"train/{NASTY}": 1.0,
        }
        for step in range(10, 110, 10)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(text + '{"step": 110, "tr')
    for step in range(0, 3000, 100):
        image = rng.integers(0, 256, (64, 64, 3), np.uint8)
        pictures.save_png(workdir / f"samples/step_{step:08d}.png", image)
    for step in (50, 100):
        name = f"evals/step_{step:08d}_samples"
        pictures.save_png(
            workdir / f"{name}_classes.png", np.zeros((8, 9, 3), np.uint8)
        )
        numbers = {"recall": step / 200, "recall_real": 0.97, "accuracy/0": 1.0}
        result = {"step": step, "evaluator": "samples", "numbers": numbers}
        result |= {"notes": {"data": NASTY}, "pictures": [f"{name}_classes.png"]}
        result |= {"intervals": {"recall": [step / 400, 0.6]}}
        result |= {"provenance": {"samples": {"num": 7}, "x": NASTY}}
        write(workdir / f"{name}.json", result)
    settings = {"name": "sampler_comparison"}
    result = {"step": 100, "evaluator": "steps", "settings": settings}
    write(workdir / "evals/steps.json", result | {"numbers": {"ddim/4/d": 1.0}})
    best = {"metric": "samples/recall", "mode": "max", "step": 50, "value": 0.25}
    write(workdir / "best.json", best)
    return workdir


def test_report_holds_everything_and_loads_nothing(run):
    path = report.write_report(run)
    assert path == run / "report.html"
    page = path.read_text()
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == [
        "Evaluation",
        "Quality against steps",
        "Samples over time",
        "Loss by noise level",
        "Curves",
        "Config",
        "Environment",
    ]
    assert "<small>highest samples/recall: 0.25</small>" in page
    assert "<small>95 %: 0.25 to 0.6; real data: 0.97</small>" in page
    assert "<dt>recall</dt>" in page
    assert "<summary>7 samples</summary>" in page
    assert page.count("<h3>steps <small>at step 100</small></h3>") == 1
    assert page.count("data:image/png") == 24 + 1, "24 grids of 30, and one picture"
    assert "data-step='0'" in page and "data-step='2,900'" in page
    outside = re.findall(r"(?:src|href)='(?!data:|#)[^']*'|url\(|https?://\S+", page)
    assert outside == ['http://www.w3.org/2000/svg";']
    assert not [p for p in run.iterdir() if p.name.endswith(".tmp")]


def test_a_band_is_the_interval_of_each_step(run):
    page = report.write_report(run).read_text()
    data = json.loads(re.search("id='data'>(.*?)</script>", page)[1])
    (chart,) = (c for c in data["charts"] if c["title"] == "eval/samples/recall")
    band = {line["name"]: line["band"] for line in chart["series"]}
    this, real = band["this run"], band["real data"]
    assert this == [[50, 0.125, 0.6], [100, 0.25, 0.6]] and real == []


def test_a_directory_of_evaluations_alone_is_a_page(run):
    for name in ("config.json", "environment.json", "metrics.jsonl", "best.json"):
        (run / name).unlink()
    shutil.rmtree(run / "samples")
    page = report.write_report(run).read_text()
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == ["Evaluation", "Quality against steps", "Curves"]
    assert "diffusionlab evaluation</p>" in page


def test_what_is_not_finite_is_told_and_a_gap_in_its_curve(tmp_path):
    inf, folder = float("inf"), tmp_path / "evals"
    folder.mkdir()
    for step, value in enumerate((0.5, inf, 0.25, inf), 1):
        numbers = {"recall": value, "recall/0": -value, "recall/1": 1.0}
        result = {"step": step, "evaluator": "q", "numbers": numbers}
        result |= {"class_names": ["0", "1"], "intervals": {"recall": (0.0, value)}}
        workdir.write_json(folder / f"{step}_q.json", result)
    page = report.write_report(tmp_path).read_text()
    assert "<dt>recall</dt><dd>inf</dd>" in page and "95 %: 0 to inf" in page
    assert "<td>-inf</td>" in page
    data = json.loads(re.search("id='data'>(.*?)</script>", page)[1])
    lines = {c["title"]: c["series"][0] for c in data["charts"]}
    points = [[1, 0.5], [2, None], [3, 0.25], [4, None]]
    assert lines["eval/q/recall"]["points"] == points
    assert lines["eval/q/recall"]["band"] == [[1, 0.0, 0.5], [3, 0.0, 0.25]]


def test_tiles_of_one_name_say_whose_they_are(tmp_path):
    for label in "ab":
        result = {"step": 3, "evaluator": label, "numbers": {"recall": 0.5, label: 1}}
        write(tmp_path / f"evals/{label}.json", result)
    page = report.write_report(tmp_path).read_text()
    assert "<dt>a recall</dt>" in page and "<dt>b recall</dt>" in page


def test_charts_of_many_classes_have_a_limit():
    numbers = {f"accuracy/{i}": 0.5 for i in range(100)}
    evals = [{"step": s, "evaluator": "q", "numbers": numbers} for s in (1, 2)]
    (chart,) = curves.charts(curves.collect([], evals))
    assert len(chart["series"]) == 20
    assert [chart["series"][i]["name"] for i in (0, -1)] == ["0", "99"]


def test_text_is_escaped(run):
    page = report.write_report(run).read_text()
    assert NASTY not in page
    assert "&lt;/script&gt;" in page and "\\u003c/script>" in page
    assert "<h1>a &lt;run&gt;</h1>" in page


def test_missing_parts_are_absent(tmp_path):
    page = report.write_report(tmp_path).read_text()
    assert "<h2>" not in page and "<section" not in page
    with pytest.raises(FileNotFoundError, match="nothing"):
        report.write_report(tmp_path / "nothing")


def test_large_pictures_are_made_smaller(tmp_path):
    rng = np.random.default_rng(0)
    for step in range(6):
        image = rng.integers(0, 256, (800, 800, 3), np.uint8)
        pictures.save_png(tmp_path / f"samples/step_{step:08d}.png", image)
    assert sum(p.stat().st_size for p in tmp_path.glob("samples/*")) > 10_000_000
    path = report.write_report(tmp_path)
    assert path.stat().st_size < 6_000_000
    assert "data:image/jpeg" in path.read_text()


def chromium():
    """Path of a Chromium; without one, skips, or fails where one is required."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    reason = "no chromium on PATH (Debian package 'chromium')"
    if os.environ.get("DIFFUSIONLAB_REQUIRE_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def browse(page, profile, *arguments):
    """Opens the page in a fresh headless Chromium; returns (stdout, stderr)."""
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run hide-scrollbars "
        "disable-background-networking disable-component-update disable-sync "
        "disable-dev-shm-usage enable-logging=stderr virtual-time-budget=2000"
    )
    command = [chromium(), *(f"--{flag}" for flag in flags.split())]
    command += [f"--user-data-dir={profile}", *arguments, page.as_uri()]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True
    )
    return result.stdout, result.stderr


def test_report_works_in_a_browser(run, tmp_path):
    page, picture = report.write_report(run), tmp_path / "page.png"
    dom, log = browse(page, tmp_path / "one", "--dump-dom")
    root = re.search("<html[^>]*>", dom)[0]
    # Loss by level; loss, learning rate, the nasty name; recall, accuracy.
    assert 'data-ready="6"' in root, root
    assert "data-error" not in root
    assert "CONSOLE" not in log, "the console of the browser is silent"
    assert "<title>a &lt;run&gt; · diffusionlab</title>" in dom, "no text became code"
    assert dom.count("<path ") >= 6
    assert dom.count('<polygon class="band"') == 1
    browse(page, tmp_path / "two", f"--screenshot={picture}", "--window-size=900,1200")
    seen = np.asarray(Image.open(picture).convert("RGB"))
    assert seen.shape[:2] == (1200, 900)
    assert len(np.unique(seen.reshape(-1, 3), axis=0)) > 50, "something is drawn"
