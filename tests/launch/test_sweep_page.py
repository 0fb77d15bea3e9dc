import json
import re

import numpy as np
import pytest
from PIL import Image
from test_report import browse
from test_sweep_table import LOSS, RATE, WIDTH, finish, happen, make_sweep, rows

from diffusionlab import pictures
from launch import page

NASTY = "</script><script>document.title='pwned'</script>'\""
NASTY_METRIC = "train/<img src=x onerror=\"document.title='pwned'\">"


def data_of(path):
    return json.loads(re.search("id='data'>(.*?)</script>", path.read_text())[1])


def headings(path):
    return re.findall("<h2>(.*?)</h2>", path.read_text())


def pretend(path, script):
    """The page with a user who does what the script says."""
    text, end = path.read_text(), "</body>"
    assert text.count(end) == 1
    copy = path.with_name("used.html")
    copy.write_text(text.replace(end, f"<script>{script}</script>{end}"))
    return copy


def curve(scale, steps=(10, 20, 30)):
    return [{"step": s, LOSS: scale / s, "train/loss": scale * s} for s in steps]


@pytest.fixture
def sweep(tmp_path):
    """Three rates with two seeds: four done, one pruned, one that has not started."""
    folder = tmp_path / "a <sweep>"
    points = [{RATE: r, "config.seed": s} for r in (1e-4, 1e-3, 1e-2) for s in (0, 1)]
    trials = make_sweep(folder, points, name=NASTY, seeds=2, revision="12ab")
    for trial, value in zip(trials, (30.0, 60.0, 8.0, 12.0, 90.0), strict=False):
        rows(trial, *curve(value))
        happen(trial, ("started", 100.0, {"job": "1"}))
    for trial, value in zip(trials[:4], (1.0, 2.0, 0.3, 0.4), strict=True):
        finish(trial, step=100, loss=value)
    ended = {"job": "1", "cause": "pruned"}
    happen(
        trials[4],
        ("started", 1.0, {"job": "1"}),
        ("ended", 3.0, ended),
        ("pruned", 4.0, {}),
    )
    (trials[0] / "report.html").write_text("its own")
    for step in (10, 30):
        image = np.full((16, 16, 3), step, np.uint8)
        pictures.save_png(trials[2] / f"samples/step_{step:08d}.png", image)
    (trials[3] / "samples").mkdir()
    (trials[3] / "samples" / "step_00000030.txt").write_text(f"def {NASTY}")
    return folder


def test_the_page_holds_everything_and_loads_nothing(sweep):
    path = page.write_page(sweep)
    assert path == sweep / "report.html"
    names = ["Groups", "Trials", "Curves", "Overrides", "Samples", "Definition"]
    assert headings(path) == names
    text = path.read_text()
    assert f"<dt>lowest {LOSS}</dt><dd>0.3</dd>" in text
    assert "<dt>best trial</dt><dd>0002-abc</dd>" in text
    assert "config <code>configs/x.py</code>" in text and "12ab" in text
    for words in ("4 done", "1 waiting", "1 pruned"):
        assert f"</i>{words}</span>" in text
    assert text.count("<tr class='best'") == 2, "a group and a trial"
    assert text.count("data:image/png") == 1, "the last samples of one trial"
    assert "<b>0002-abc</b> step 30<br><span>learning_rate.value = 0.001" in text
    outside = re.findall(r"(?:src|href)='(?!data:|#)[^']*'|url\(|https?://\S+", text)
    assert set(outside) == {
        "href='runs/0000-abc/report.html'",
        'http://www.w3.org/2000/svg",',
    }
    assert not [p for p in sweep.iterdir() if p.name.endswith(".tmp")]


def test_the_data_of_the_plots_are_those_of_the_files(sweep):
    data = data_of(page.write_page(sweep, {"1": "running"}))
    assert data["names"] == ["learning_rate.value"], "seeds are no axis"
    assert list(data["curves"]) == [LOSS, "train/loss"], "the metric first"
    # The result at step 100 stands where metrics.jsonl lacks it.
    assert data["curves"][LOSS]["0"] == [10, 3.0, 20, 1.5, 30, 1.0, 100, 1.0]
    assert data["curves"]["train/loss"]["4"] == [10, 900.0, 20, 1800.0, 30, 2700.0]
    assert [trial["value"] for trial in data["trials"]] == [1, 2, 0.3, 0.4, 3, None]
    assert [trial["state"] for trial in data["trials"]][3:] == [
        "done",
        "running",
        "waiting",
    ]
    about = json.loads((sweep / "sweep.json").read_text()) | {"metric": "train/loss"}
    (sweep / "sweep.json").write_text(json.dumps(about))
    again = data_of(page.write_page(sweep))
    assert list(again["curves"]) == ["train/loss", LOSS], "then this one is"
    assert data["trials"][5]["overrides"] == {"learning_rate.value": 0.01, "seed": 1}


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path):
    (a, b) = make_sweep(tmp_path, [{RATE: 1.0}, {RATE: 2.0}])
    rows(a, *curve(1.0, range(1, 5001)))
    rows(b, {"step": 1, LOSS: "nan"}, {"step": 2, LOSS: 1 / 3})
    found = data_of(page.write_page(tmp_path))["curves"][LOSS]
    assert len(found["0"]) == 2 * 400
    assert found["0"][:2] == [1, 1.0] and found["0"][-2:] == [5000, 0.0002]
    assert found["1"] == [1, None, 2, 0.333333]


def test_text_is_escaped(sweep):
    text = page.write_page(sweep).read_text()
    assert NASTY not in text
    assert text.count("<script") == 2, "the data and the script of the page"
    assert text.count("&lt;/script&gt;&lt;script&gt;") >= 4


def test_pictures_have_a_limit_and_the_page_says_how_many_it_leaves_out(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(page, "_MAX_IMAGE_BYTES", 50_000)
    rng = np.random.default_rng(0)
    trials = make_sweep(tmp_path, [{RATE: float(r)} for r in range(5)])
    for trial, loss in zip(trials, (5.0, 4.0, 3.0, 2.0, 1.0), strict=True):
        image = rng.integers(0, 256, (400, 400, 3), np.uint8)
        pictures.save_png(trial / "samples/step_00000001.png", image)
        finish(trial, loss=loss)
    path = page.write_page(tmp_path)
    text = path.read_text()
    shown = re.findall("alt='samples of (.*?)'", text)
    assert shown[:2] == ["0004-abc", "0003-abc"], "the best first"
    assert 2 <= len(shown) < 5 and "data:image/jpeg" in text
    assert f"left out, to keep this page small: {5 - len(shown)} pictures" in text
    assert path.stat().st_size < 150_000


def test_a_sweep_that_has_written_nothing_is_a_page(tmp_path):
    make_sweep(tmp_path / "none", [])
    path = page.write_page(tmp_path / "none")
    assert headings(path) == ["Definition"]
    assert "there is no trial yet" in path.read_text()
    make_sweep(tmp_path / "new", [{RATE: 1.0}, {RATE: 2.0}])
    assert headings(page.write_page(tmp_path / "new")) == [
        "Trials",
        "Overrides",
        "Definition",
    ]
    make_sweep(tmp_path / "bare", [{RATE: 1.0}, {RATE: 2.0}], metric="")
    headed = headings(page.write_page(tmp_path / "bare"))
    assert headed == ["Trials", "Definition"]
    with pytest.raises(FileNotFoundError, match="holds no sweep"):
        page.write_page(tmp_path / "other")


USER = """
const seen = {}, all = (query) => [...document.querySelectorAll(query)];
const column = (k) => all('#trials tbody tr').map((row) => row.cells[k].textContent);
const heads = all('#trials thead button');
const metric = heads.findIndex((head) => head.textContent === 'eval/held_out/loss');
const paths = () => all('#curves path').map((path) => path.getAttribute('d')).join();
heads[metric].click();
seen.up = column(metric);
seen.sorted = heads[metric].parentNode.getAttribute('aria-sort');
heads[metric].click();
seen.down = column(metric);
heads[0].click();
seen.names = column(0);
const before = paths();
const [select, colour] = all('#curves select');
seen.metrics = [...select.options].map((option) => option.value);
select.value = 'train/loss';
select.onchange();
seen.changed = paths() !== before;
seen.label = document.querySelector('#curves svg').getAttribute('aria-label');
const log = document.querySelector('#curves input'), was = paths();
seen.log = log.checked;
log.checked = !log.checked;
log.onchange();
seen.switched = paths() !== was;
all('#trials tbody .pick')[1].click();
seen.on = all('#curves path.on').map((node) => node.dataset.trial);
seen.pressed = all('.pick[aria-pressed=true]').map((node) => node.textContent);
all('#groups tbody tr')[0].dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}));
seen.group = all('#overrides .mark.on').map((node) => node.dataset.trial).sort();
const root = document.documentElement.style;
const tones = () => [0, 1, 2].map((i) => root.getPropertyValue(`--t${i}`));
seen.tones = new Set(tones()).size;
colour.value = '';
colour.onchange();
seen.own = new Set(tones()).size;
const svg = document.querySelector('#overrides svg');
const frame = svg.getBoundingClientRect();
const dot = document.querySelector('#overrides .mark[data-trial="0"]');
const at = ['cx', 'cy'].map((name) => Number(dot.getAttribute(name)));
svg.onpointermove({clientX: frame.left + at[0], clientY: frame.top + at[1]});
seen.tip = [...document.querySelector('.tip').children].map((c) => c.textContent);
seen.apart = all('#overrides text.apart').map((node) => node.textContent);
seen.titles = all('#overrides text.name').map((node) => node.textContent);
seen.hollow = all('#overrides .mark:not(.filled)').length;
const dots = [0, 2, 4].map((i) => all(`#overrides [data-trial="${i}"]`)[0]);
const [a, b, c] = dots.map((node) => Number(node.getAttribute('cx')));
seen.even = Math.abs(b - a - (c - b)) < 1;
const out = document.createElement('pre');
out.id = 'seen';
out.textContent = JSON.stringify(seen).replaceAll('<', '(').replaceAll('&', '+');
document.body.append(out);
"""


def test_the_page_works_in_a_browser(sweep, tmp_path):
    path, picture = page.write_page(sweep), tmp_path / "page.png"
    dom, log = browse(pretend(path, USER), tmp_path / "one", "--dump-dom")
    root = re.search("<html[^>]*>", dom)[0]
    assert 'data-ready="2"' in root and "data-error" not in root, root
    assert "CONSOLE" not in log, "the console of the browser is silent"
    seen = json.loads(re.search('<pre id="seen">(.*?)</pre>', dom)[1])
    # The empty one stays last.
    assert seen["up"] == ["0.3", "0.4", "1", "2", "3", ""]
    assert seen["down"] == ["3", "2", "1", "0.4", "0.3", ""]
    assert seen["sorted"] == "ascending"
    assert [name[:4] for name in seen["names"]] == [f"000{i}" for i in range(6)]
    assert seen["metrics"] == [LOSS, "train/loss"]
    assert seen["changed"] and seen["label"] == "train/loss over steps"
    assert seen["log"] and seen["switched"], "80 to 2700 is more than a factor of 30"
    assert seen["on"] == ["1"] and seen["pressed"] == ["0001-abc"]
    assert seen["group"] == ["1", "2", "3"], "those of the best rate are added"
    assert seen["tones"] == 2, "by rate: two trials have the same"
    assert seen["own"] == 3
    assert seen["tip"] == [
        "0000-abc",
        f"{LOSS}: 1",
        "learning_rate.value = 0.0001",
        "seed = 0",
    ]
    assert seen["apart"] == ["unfinished", "pruned"] and seen["hollow"] == 2
    assert sorted(seen["titles"]) == [LOSS, "learning_rate.value"]
    assert seen["even"], "1e-4, 1e-3 and 1e-2 on a logarithmic axis"
    browse(path, tmp_path / "two", f"--screenshot={picture}", "--window-size=900,1600")
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape[:2] == (1600, 900)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100, "something is drawn"


def test_several_overrides_are_parallel_axes_and_nothing_becomes_code(tmp_path):
    values = ["heun", NASTY, None, "ddim"]
    points = [
        {RATE: 10.0**-i, WIDTH: NASTY, "config.x": v} for i, v in enumerate(values)
    ]
    points[3] = {RATE: 1e-3, WIDTH: [1, 2]}
    trials = make_sweep(tmp_path, points, name=NASTY, config=NASTY, engine=NASTY)
    for i, trial in enumerate(trials[:3]):
        rows(trial, {"step": 1, NASTY_METRIC: 1.0}, {"step": 2, NASTY_METRIC: 2.0})
        finish(trial, loss="nan" if i == 2 else i + 1)
    ends = [
        ("ended", 1.0, {"cause": "failed", "job": j, "message": NASTY}) for j in "12"
    ]
    happen(trials[3], *ends)
    user = """
    const seen = [...document.querySelectorAll('#overrides path')].map((path) =>
      path.getAttribute('d').split('L').length);
    document.body.dataset.points = seen.join();
    document.body.dataset.axes = document.querySelectorAll('#overrides .name').length;
    const svg = document.querySelector('#overrides svg');
    const frame = svg.getBoundingClientRect();
    svg.onpointermove({clientX: frame.left + 96, clientY: frame.top + 60});
    const select = document.querySelector('#curves select');
    document.body.dataset.metrics = select.options.length;
    select.value = [...select.options].at(-1).value;
    select.onchange();
    document.body.dataset.apart = [...document.querySelectorAll('#overrides .apart')]
      .map((node) => node.textContent).join();
    const dashed = document.querySelectorAll('#overrides .broken');
    document.body.dataset.dashed = dashed.length;
    document.body.dataset.scripts = document.scripts.length;
    document.body.dataset.images = document.images.length;
    """
    copy = pretend(page.write_page(tmp_path), user)
    dom, log = browse(copy, tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" not in log and "data-error" not in dom
    body = re.search("<body[^>]*>", dom)[0]
    assert 'data-points="4,4,4,4"' in body and 'data-axes="4"' in body
    assert 'data-metrics="2"' in body
    # One has no x at all; of the metric's axis the two without a value.
    assert 'data-apart="none,given up,no value"' in body
    assert 'data-dashed="1"' in body
    assert "· diffusionlab</title>" in dom
    assert 'data-scripts="3"' in body, "the data, the page's script, and the user"
    assert 'data-images="0"' in body
