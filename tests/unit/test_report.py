"""The report: everything is on the page, the page is safe and self-contained."""

from __future__ import annotations

import base64
import html.parser
import math
import re

import matplotlib
import matplotlib._pylab_helpers
import pytest
from PIL import Image

from s2s_scale.report.page import LONGEST_TEXT, RunRecord, write_report
from s2s_scale.report.plots import MOST_POINTS, PANELS, drawn_panels, panel_svg, points


def history(steps=5):
    entries = []
    for step in range(1, steps + 1):
        entries.append(
            {
                "step": step,
                "loss": 5 / step,
                "nll_loss": 4 / step,
                "learning_rate": 1e-3,
                "grad_norm": 1.0,
                "tokens_per_second": 900.0,
            }
        )
        entries.append(
            {"step": step, "eval_loss": 6 / step, "eval_nll_loss": 5 / step, "eval_bleu": 10 * step}
        )
    return entries


def record(**changes):
    values = {
        "title": "A run",
        "history": history(),
        "results": {"test_bleu": 98.76, "test_loss": 0.5, "train_runtime": 3671.0},
        "settings": {"learning_rate": (0.003, "conf.yaml:7"), "seed": (42, "default")},
        "versions": {"torch": "2.13.0"},
        "samples": [("test", "two", "zwei", "zwei"), ("test", "three", "drei", "frei")],
    }
    return RunRecord(**{**values, **changes})


def page_of(tmp_path, **changes):
    page, _ = write_report(record(**changes), tmp_path)
    return page.read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Tags, attributes and visible text; complains about tags that do not match."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def visible(self):
        return " ".join(" ".join(self.text).split())


def test_both_files_are_written_and_nothing_else(tmp_path):
    page, picture = write_report(record(), tmp_path / "new")
    assert (page.name, picture.name) == ("report.html", "report.png")
    assert sorted(tmp_path.joinpath("new").iterdir()) == [page, picture]
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width >= 1_000


def test_page_shows_results_settings_versions_and_samples(tmp_path):
    text = Page(page_of(tmp_path)).visible
    for expected in (
        "A run",
        "98.8 BLEU (test)",
        "0.500 loss (test)",
        "5 optimizer steps",
        "1 h 01 min training time",
        "learning_rate 0.003 conf.yaml:7",
        "1 settings at their defaults seed 42",
        "torch 2.13.0",
        "test three drei frei",
        "2 rows; output differs from the reference in 1",
        "bleu 98.76",
    ):
        assert expected in text, expected


def test_page_asks_the_network_for_nothing(tmp_path):
    text = page_of(tmp_path)
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_every_panel_is_an_image_with_a_description(tmp_path):
    images = [attributes for tag, attributes in Page(page_of(tmp_path)).tags if tag == "img"]
    assert len(images) == len(PANELS) == 6
    for image in images:
        assert "optimizer steps" in image["alt"]
        picture = base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,"))
        assert b"<svg" in picture


def test_text_from_outside_is_escaped_everywhere(tmp_path):
    bad = "<script>alert('x')</script> & \"y\""
    text = page_of(
        tmp_path,
        title=bad,
        results={f"test_{bad}": bad, bad: bad},
        settings={bad: (bad, bad), "d": (bad, "default")},
        versions={bad: bad},
        samples=[(bad, bad, bad, bad)],
    )
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;y&quot;" in text
    assert bad in Page(text).visible


def test_long_texts_are_cut_with_their_length_said(tmp_path):
    text = Page(
        page_of(tmp_path, samples=[("val", "s", "r", "x" * (LONGEST_TEXT + 1_234))])
    ).visible
    assert "x" * LONGEST_TEXT + "… (1,234 more characters)" in text


@pytest.mark.parametrize(
    ("entries", "titles"),
    [
        ([{"step": 1, "loss": 2.0}], ["Loss (label smoothing included)"]),
        ([{"step": 10, "eval_chrf": 3.0}], ["BLEU and chrF on validation"]),
        ([{"step": 1, "loss": math.nan, "grad_norm": 2.0}], ["Gradient norm"]),
        ([{"step": 1, "loss": math.inf}, {"loss": 3.0}, {"train_runtime": 2.0, "step": 4}], []),
        ([], []),
    ],
)
def test_missing_series_leave_their_panel_out(tmp_path, entries, titles):
    assert [panel.title for panel in drawn_panels(entries)] == titles
    text = page_of(tmp_path, history=entries)
    assert text.count("<img") == len(titles)
    assert ("Nothing was logged" in text) == (not titles)
    with Image.open(tmp_path / "report.png") as image:
        assert image.size[0] > 1_000


def test_an_empty_record_still_gives_a_page(tmp_path):
    page, picture = write_report(RunRecord("Nothing yet"), tmp_path)
    assert "Nothing yet" in Page(page.read_text(encoding="utf-8")).visible
    assert picture.stat().st_size > 0


def test_points_are_in_step_order_with_gaps_and_the_later_value_of_a_repeated_step():
    entries = [
        {"step": 2, "loss": 9.0},
        {"step": 1, "loss": 1.0},
        {"step": 3, "loss": math.nan},
        {"step": 4, "loss": "none"},
        {"step": 2, "loss": 2.0},
        {"step": 5},
        {"loss": 7.0},
    ]
    steps, values = points(entries, "loss")
    assert steps == [1, 2, 3, 4]
    assert values[:2] == [1.0, 2.0]
    assert all(math.isnan(value) for value in values[2:])


def test_a_gap_splits_the_line():
    entries = [{"step": step, "loss": float(step)} for step in range(1, 101)]
    entries[49]["loss"] = math.nan
    svg = panel_svg(entries, PANELS[0]).decode()
    line = max(re.findall(r'<path d="([^"]*)"', svg), key=len)
    assert len(re.findall("M", line)) == 2


def test_long_histories_are_thinned_and_keep_their_last_point(tmp_path):
    entries = [{"step": step, "loss": float(step % 7)} for step in range(1, 30_001)]
    svg = panel_svg(entries, PANELS[0])
    assert len(svg) < 60 * MOST_POINTS
    write_report(record(history=entries), tmp_path)
    assert "30,000 optimizer steps" in Page((tmp_path / "report.html").read_text()).visible


def test_title_with_formula_signs_is_drawn_as_written(tmp_path):
    _, picture = write_report(record(title="costs $5 or $x_1^{$ \n" + "long " * 60), tmp_path)
    assert picture.stat().st_size > 0


def test_matplotlibs_global_state_is_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    write_report(record(), tmp_path)
    assert dict(matplotlib.rcParams) == before
    assert matplotlib._pylab_helpers.Gcf.get_all_fig_managers() == []


def test_a_failed_write_leaves_the_earlier_report(tmp_path, monkeypatch):
    write_report(record(title="first"), tmp_path)
    before = (tmp_path / "report.html").read_bytes()

    def no_space(partial, path):
        assert partial.stat().st_size > 0
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("s2s_scale.utils.os.replace", no_space)
    with pytest.raises(OSError, match="No space"):
        write_report(record(title="second"), tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.png"]


def test_shapes_of_batches_are_a_table(tmp_path):
    row = ("16", "24", "31", "880", "102", "87.5%")
    page = page_of(tmp_path, shapes=[row])
    assert "Shapes of training batches" in page
    assert all(cell in page for cell in row)
    assert "Shapes of training batches" not in page_of(tmp_path, shapes=[])


def test_results_without_a_split_and_signatures_are_listed(tmp_path):
    text = Page(
        page_of(
            tmp_path, results={"nonfinite_steps": 2, "bleu signature": "nrefs:1", "val_x": 1e-9}
        )
    ).visible
    assert "nonfinite_steps 2" in text
    assert "bleu signature nrefs:1" in text
    assert "x 1e-09" in text
