"""The page of a run: whole, alone in the world, and of the numbers that metrics.jsonl holds; in a browser, by `make page`."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from fmegatron import cli
from fmegatron.train import chart, metrics, page

VOID = {"meta"}


class Reader(HTMLParser):
    """Tags in order, errors of nesting, attributes, and the text of scripts."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.attributes, self.scripts = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, text):
        if self.open and self.open[-1] == "script":
            self.scripts.append(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, as two sessions on a mesh would leave it: a lost number, a name that is no HTML."""
    folder = tmp_path_factory.mktemp("runs") / "<b>run & co"
    folder.mkdir()
    began, records = 1.7e9, []
    for step in range(1, 61):
        record = {"step": step, "loss": None if step == 7 else 5 / step + 0.1 / 3, "grad_norm": 1.0 / step, "lr": 1e-3 * step,
                  "seconds": 1.0, "tokens_per_second": 1e6 / step, "memory_bytes": 3e9, "goodput": 0.9, "skipped": 0,
                  "time": began + 10 + step, "time/data": 0.01, "time/forward_backward": 0.4, "time/optimizer": 0.05}
        if step % 10 == 0:
            record |= {"heldout_loss": 4 / step, "time/validation": 0.2, "validation/x/loss": 1.5}
            record |= {"attention/01.max_logit": 2.0}
        if step % 20 == 1 and step > 1:
            record["time/checkpoint"] = 0.3
        records.append(record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "config.toml").write_text('[run]\nname = "</pre><script>alert(1)</script>"\n')
    sessions = [{"started": began, "steps": 0}, {"started": began + 40, "steps": 30}]
    said = {"started": began, "sessions": sessions, "environment": {"torch": "2"},
            "model": {"name": "llama3:debug", "parameters": 12},
            "mesh": {"kind": "device", "axes": {"dp": 2, "cp": 1, "tp": 4}, "rules": "fsdp_tp_sp", "compiled": True}}
    (folder / "run.json").write_text(json.dumps(said))
    assert cli.main(["report", str(folder)]) == 0
    return folder


def read(folder):
    text = (folder / "report.html").read_text()
    reader = Reader()
    reader.feed(text)
    return text, reader


def test_it_is_well_formed_and_asks_nothing_of_the_network(run):
    text, reader = read(run)
    assert not reader.wrong and not reader.open
    assert not [a for a in reader.attributes if a[1] in ("src", "href", "srcset", "action", "data")]
    assert not re.search(r"(?i)https?:|//[a-z]|@import|url\(|fetch\(|XMLHttpRequest|WebSocket", text)
    assert len(reader.scripts) == 2 and "alert(1)" not in "".join(reader.scripts)  # the settings are text
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        assert ElementTree.fromstring(svg) is not None and "nan" not in svg


def test_its_numbers_are_those_of_the_metrics(run):
    text, reader = read(run)
    data = json.loads(reader.scripts[0])
    records = metrics.read(run / "metrics.jsonl")
    names = {name for record in records for name in record} - {"step"}
    expected = {n: [[r["step"], r[n]] for r in records if isinstance(r.get(n), int | float)] for n in names}
    assert data == expected and len(data["loss"]) == 59
    tiles = {v: json.loads(value) for v, value in re.findall(r'data-name="(\w+)" data-value="([^"]+)"', text)}
    assert tiles.items() >= {"loss": records[-1]["loss"], "heldout_loss": 4 / 60, "step": 60}.items()
    assert ">0.1167</b><span>loss</span>" in text and ">0.0667</b><span>held-out loss</span>" in text
    assert ">3.00 GB</b><span>memory</span>" in text and ">0</b><span>skipped steps</span>" in text
    for title in ("Loss", "Learning rate", "Largest attention logit", "Time", "Mesh", "Environment", "Settings"):
        assert f">{title}" in text
    assert text.count('class="rank"') == 8 and "<b>5</b> dp 1 tp 1" in text and "session 2: 40 s" in text


def test_lines_go_through_their_points(run):
    text, _ = read(run)
    figure = next(f for f in re.findall(r"<figure>.*?</figure>", text, re.S) if "<figcaption>Learning rate" in f)
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', figure)[1].split()]
    assert len(points) == 60
    slope = (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
    assert slope < 0 and all(abs(y - points[0][1] - slope * (x - points[0][0])) < 0.2 for x, y in points)  # lr is a line


def test_the_time_adds_up(run):
    text, _ = read(run)
    parts = re.findall(r'</i>([a-z ]+): ([\d.]+) s, ([\d.]+) %', text)
    seconds = {"data": 0.6, "forward and backward": 24.0, "optimizer": 3.0, "rest of steps": 32.4, "validation": 1.2,
               "checkpoint": 0.6}  # of 60 steps of 1 s, and what came between them
    assert {label: float(said) for label, said, _ in parts} == seconds
    assert [float(part) for *_, part in parts] == [round(100 * x / 61.8, 1) for x in seconds.values()]
    timeline = text.split("<h3>Timeline</h3>")[1].split("</svg>")[0]
    spans = re.findall(r'class="f(\d)" x="([\d.]+)" y="0" width="([\d.]+)"', timeline)
    kinds = [kind for kind, *_ in spans]
    assert {kind: kinds.count(kind) for kind in "045"} == {"0": 6 + 2, "4": 6, "5": 2}  # training without a gap is one span
    assert max(float(x) + float(wide) for _, x, wide in spans) == pytest.approx(940, abs=0.02)


def test_axes():
    """A logarithmic one has powers at equal distances; of a line that is 0 throughout it begins at 0."""
    svg = chart.lines({"a": [(n, 2.0**n) for n in range(5)]}, log=True)
    ups = [float(p.split(",")[1]) for p in re.search(r'points="([^"]+)"', svg)[1].split()]
    assert [a - b for a, b in zip(ups, ups[1:], strict=False)] == pytest.approx([(ups[0] - ups[-1]) / 4] * 4, abs=0.11)
    flat = ElementTree.fromstring(chart.lines({"a": [(1, 0.0), (2, 0.0)]}).split("<div")[0])
    said = [float(x.text) for x in flat.iter("text") if x.get("text-anchor") == "end"]
    assert (said[0], said[-1]) == (0, 1)


def test_of_many_layers_the_line_over_all_of_them_is_shown():
    columns = {name: [(1, 1.0), (2, 2.0)] for name in ("x/max_logit/max", *(f"x/{n:02d}.max_logit" for n in range(20)))}
    keys = re.search(r'data-keys="([^"]+)"', page._panel(columns, "T", "", False, ("x/*.max_logit",)))[1].split()
    assert keys == ["x/max_logit/max"]
    del columns["x/max_logit/max"]
    keys = re.search(r'data-keys="([^"]+)"', page._panel(columns, "T", "", False, ("x/*.max_logit",)))[1].split()
    assert keys == [f"x/{n:02d}.max_logit" for n in range(page.MANY)]


def test_many_points_are_thinned_and_keep_their_extremes():
    points = [(i, math.sin(i) + (50.0 if i == 77_777 else -50.0 if i == 33_333 else 0.0)) for i in range(100_000)]
    thin = page.thinned(points)
    assert len(thin) <= page.MOST and thin == sorted(set(thin)) and set(thin) <= set(points)
    assert thin[0] == points[0] and thin[-1] == points[-1] and max(y for _, y in thin) > 49
    assert min(y for _, y in thin) < -49
    assert page.thinned(points[:2000]) == points[:2000]


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"fmegatron: {tmp_path}: no metrics.jsonl, so no run; name the folder of one (run.dir)\n"


BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_browser_runs_its_script_and_draws_it(run, tmp_path):
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
             "--window-size=1050,2000", "--enable-logging=stderr", "--v=0"]
    address = (run / "report.html").as_uri()
    done = subprocess.run([*words, "--dump-dom", address], capture_output=True, text=True, timeout=120)
    charts = (run / "report.html").read_text().count('<svg class="chart"')
    assert f'data-ready="{charts}"' in done.stdout and charts >= 8, done.stderr[-2000:]
    assert "Uncaught" not in done.stderr and "SyntaxError" not in done.stderr
    picture = tmp_path / "page.png"
    subprocess.run([*words, f"--screenshot={picture}", address], capture_output=True, timeout=120, check=True)
    from matplotlib.image import imread
    assert len({tuple(pixel) for pixel in imread(picture)[::7, ::7].reshape(-1, 4).round(2)}) > 20  # not a blank page
