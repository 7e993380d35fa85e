"""The report: its figures are those of the files, its page is whole and needs nothing from outside."""

from __future__ import annotations

import base64
import csv
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from headless_browser import find_browser, visit
from report_helpers import CODES, STEPS, write_run, write_transcripts

from nemo_slam.evaluation.report import figures, make, panels, runs, transcripts

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    base = tmp_path_factory.mktemp("runs")
    return [write_run(base / "good", 20.0, 0.8), write_run(base / "fallen", 1.5, 0.0, loss=2.0, lr=0.5, bad_loss=1500)]


@pytest.fixture(scope="module")
def page(folders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    texts = write_transcripts(out.with_name("out.jsonl"))
    make.make(folders, out, [texts], [texts], with_model=False)
    return out


# ---- files to figures ----------------------------------------------------------------------------


def test_columns_are_those_of_the_csv(folders):
    run = runs.read_run(folders[0])
    with (folders[0] / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["step"] != "2100"]
    assert rows[5]["step"] == rows[4]["step"] == "500"  # training and validation are rows of their own
    for name in set(rows[0]) - {"step"}:
        expected = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        columns = run.validation if name.startswith("val_") else run.training
        series = columns[name.removeprefix("val_")]
        assert list(zip(series.steps, series.values, strict=True)) == expected
    assert run.last_step == 2000  # the line that a kill cut short is no step
    assert run.bad_rows == 1
    assert run.figure("loss").steps == (500, 1000, 1500, 2000)
    assert run.figure("lr").steps == tuple(STEPS)


def test_a_value_that_is_no_number_is_named(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n1,2\n2,many\n")
    with pytest.raises(ValueError, match=r"metrics\.csv, line 3: loss is 'many'"):
        runs.read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        runs.read_run(tmp_path / "nothing")


def test_curves_draw_what_the_csv_holds(folders):
    read = runs.read_runs(folders)
    groups, throughput = panels.panels(read)
    drawn = {panel.column: panel for group in groups.values() for panel in group} | {p.column: p for p in throughput}
    guesses = {name for panel in drawn.values() for name in panel.guesses}
    for run in read:
        assert set(run.training) | set(run.validation) == set(drawn) | guesses | {"seconds"}
    assert "brand_new" in groups  # a column that no panel knows
    assert guesses == {"masked_speech/code_top_share"}
    for column, panel in drawn.items():
        axes = figures.curve(panel, read, [CODES, CODES]).axes[0]
        found = {(line.get_gid(), line.get_color()): line.get_xydata() for line in axes.lines}
        for place, run in enumerate(read):
            for kind, columns in (("training", run.training), ("validation", run.validation)):
                if column in columns:
                    steps, values = columns[column].steps, np.array(columns[column].values) * panel.scale
                    finite = np.isfinite(values)
                    expected = np.stack([np.array(steps)[finite], values[finite]], axis=1)
                    np.testing.assert_array_equal(found[kind, figures.colour(place)], expected)
        if column == "loss":
            assert found["not finite", "#c62828"][:, 0].tolist() == [1500]
        assert axes.get_xlabel() == "step"
        assert axes.get_title(loc="left")


def test_long_curves_are_means_of_equal_parts():
    steps = tuple(range(4000))
    values = np.random.default_rng(0).normal(size=4000)
    x, y = figures.thinned(runs.Series(steps, tuple(values)), 2.0, most=100)
    np.testing.assert_allclose(x, np.arange(4000).reshape(100, 40).mean(1))
    np.testing.assert_allclose(y, 2 * values.reshape(100, 40).mean(1))


def test_code_usage_is_sorted_shares():
    counts = np.array([5, 0, 15, 80])
    axes = figures.code_usage(counts, 0).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.8, 0.15, 0.05, 0.0]


def test_differences_of_config(folders):
    found = dict(runs.config_differences(runs.read_runs(folders)))
    assert found == {"name": ["good", "fallen"], "model.optim.lr": ["0.001", "0.5"]}


def test_runs_of_one_name_are_told_apart(tmp_path):
    same = [write_run(tmp_path / parent / "run", 20, 1) for parent in "ab"]
    assert [run.label for run in runs.read_runs(same)] == ["a/run", "b/run"]


# ---- transcripts ---------------------------------------------------------------------------------


def edit_distance(reference: list[str], hypothesis: list[str]) -> int:
    row = list(range(len(hypothesis) + 1))
    for i, expected in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, heard in enumerate(hypothesis, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (expected != heard))
    return row[-1]


def test_alignments_mark_the_fewest_errors():
    rng = np.random.default_rng(2)
    for _ in range(200):
        sides = [[str(word) for word in rng.integers(0, 4, size=rng.integers(0, 9))] for _ in range(2)]
        words = transcripts.align(*map(" ".join, sides))
        assert [word.reference for word in words if word.reference] == sides[0]
        assert [word.hypothesis for word in words if word.hypothesis] == sides[1]
        assert sum(word.kind != "hit" for word in words) == edit_distance(*sides)
        for word in words:
            kind = "inserted" if not word.reference else "deleted" if not word.hypothesis else None
            assert word.kind == (kind or ("hit" if word.reference == word.hypothesis else "substituted"))


def test_transcripts_run_from_best_to_worst(tmp_path):
    found = transcripts.read(write_transcripts(tmp_path / "out.jsonl"), "text")
    assert [(u.name, u.errors) for u in found.utterances] == [("c.wav", 0), ("a.wav", 1), ("b.wav", 4)]
    assert dict(found.scores)["wer"].startswith("83.3 [")  # 5 errors, 6 words of reference
    with pytest.raises(ValueError, match=r"out\.jsonl, line 1.*no string 'other'"):
        transcripts.read(tmp_path / "out.jsonl", "other")


# ---- the page ------------------------------------------------------------------------------------


class Whole(HTMLParser):
    """Every element is closed, in order; collects attributes and text."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_fetches_nothing(page):
    source = page.read_text(encoding="utf-8")
    parser = Whole()
    parser.feed(source)
    assert not parser.open
    assert "http://" not in source
    assert "https://" not in source
    assert "<script" not in source
    links = [value for _, name, value in parser.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    anchors = {value for _, name, value in parser.attributes if name == "id"}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors
    for link in links:
        if link.startswith("data:image/svg+xml"):
            picture = base64.b64decode(link.partition(",")[2]).decode()
            assert not re.search(r"""(?:href|src)=["'](?!#|data:)|url\((?!#)|@import""", picture)
    assert sum(name == "alt" and bool(value) for tag, name, value in parser.attributes if tag == "img") == source.count(
        "<img "
    )


def test_what_texts_hold_is_no_markup(page):
    source = page.read_text(encoding="utf-8")
    assert "seis" in source
    assert "<b>seis" not in source


def test_the_page_says_what_it_leaves_out(page):
    source = page.read_text(encoding="utf-8")
    assert source.count("left out: --without-model") == 2 * 4  # four panels of each run
    assert "These runs recorded none" in source


def report(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_script(folders, tmp_path):
    result = report(*folders, "--without-model", "--out", tmp_path / "deep" / "report.html")
    assert result.returncode == 0, result.stderr
    assert "good: healthy" in result.stdout
    assert "fallen: not healthy: losses that are no numbers; few codes in use" in result.stdout
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]
    result = report(tmp_path / "nothing")
    assert result.returncode == 2
    assert "not a run folder" in result.stderr


def test_default_place(tmp_path):
    assert make.default_path([tmp_path / "one"]) == tmp_path / "one" / "report.html"
    assert make.default_path([tmp_path / "one", tmp_path / "two"]) == tmp_path / "report.html"


@pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("width", [1280, 420])
def test_in_a_browser(page, tmp_path, width):
    """No complaint, no request but the page itself, every picture drawn, nothing wider than the window."""
    expressions = (
        "JSON.stringify([...document.images].map(i => i.complete && i.naturalWidth > 50))",
        "document.documentElement.scrollWidth",
        "document.querySelectorAll('.banner.red').length + ' ' + document.querySelectorAll('.banner.green').length",
    )
    browser = find_browser()
    assert browser is not None
    found = visit(browser, page, tmp_path / "profile", width, expressions, seconds=300)
    assert found.complaints == []
    assert [url for url in found.requests if not url.startswith("data:")] == [page.resolve().as_uri()]
    images = json.loads(found.values[0])
    assert len(images) == page.read_text(encoding="utf-8").count("<img ") >= 10
    assert all(images)
    assert found.values[1] <= width
    assert found.values[2] == "1 1"  # the fallen run is red, the other green
    assert found.screenshot.startswith(b"\x89PNG")
    (tmp_path / "report.png").write_bytes(found.screenshot)
    assert len(found.screenshot) > 50_000
