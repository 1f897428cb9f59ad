"""What the pictures of a report show: labels, ticks, and lines that can be told apart."""

import re
from itertools import product

import pytest

from paged_decode.pressure._labels import label, swept

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from paged_decode.pressure import _charts
from paged_decode.pressure.page import write_page


def made(**lists):
    """Figures of runs over every combination; the tax is nothing anywhere."""
    plain = dict(eviction="lru", victim="last", preemption="swap", admission="watermark")
    plain |= dict(link_bytes=5e10, pages=512, card="a card", model="a model")
    runs = []
    for values in product(*lists.values()):
        run = plain | dict(zip(lists, values, strict=True))
        rate = run["pages"] / 1e5
        figures = dict(output_tokens_per_second=10.0, goodput=rate, hit_rate=None)
        runs.append(run | figures | dict(ttft_seconds_p90=rate, recompute_tax=0.0, lifetimes=[0]))
    return runs


def drawn(runs, key):
    axes = Figure().subplots()
    _charts._sweep(axes, runs, key, "title", "unit")
    return axes


def test_labels_name_every_dimension_that_was_swept_and_no_other():
    runs = made(eviction=["lru", "lfu"], link_bytes=[1e9, 5e10], pages=[64, 512])
    axes = drawn(runs, "goodput")
    assert axes.get_xlabel() == "usable pages"
    assert [line.get_label() for line in axes.lines] == [
        "eviction lru, link 1GB/s",
        "eviction lru, link 50GB/s",
        "eviction lfu, link 1GB/s",
        "eviction lfu, link 50GB/s",
    ]
    every = made(**{name: [1, 2] for name in ("victim", "preemption", "admission")})
    assert label(every[-1], swept(every)) == "victim 2, preemption 2, admission 2"


def test_ticks_are_at_the_sizes_tried_and_no_line_lies_on_the_frame():
    sizes = [64, 100, 1024, 12288]
    for key in ("goodput", "recompute_tax", "output_tokens_per_second"):
        axes = drawn(made(pages=sizes), key)
        assert axes.get_xticks().tolist() == sizes
        texts = [tick.get_text() for tick in axes.get_xticklabels()]
        assert texts == ["64", "100", "1,024", "12,288"]
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        (line,) = axes.lines
        assert left < 64 and right > 12288
        assert low < min(line.get_ydata()) and high > max(line.get_ydata())


def test_lines_that_coincide_are_stripes_and_others_are_whole():
    axes = Figure().subplots()
    low, high = [(64, 0.0), (128, 1.0)], [(64, 3.0), (128, 5.0)]
    _charts.draw_lines(axes, {"a": low, "b": high, "c": [(64, 0.0), (128, 1.01)], "d": low})
    a, b, c, d = axes.lines
    assert b.get_linestyle() == "-"
    assert a.get_linestyle() == c.get_linestyle() == d.get_linestyle() == "--"
    assert a.get_markersize() > c.get_markersize() > d.get_markersize()
    assert len({line.get_marker() for line in axes.lines}) == 4


def test_over_links_the_line_is_over_links_and_over_names_there_are_bars():
    axes = drawn(made(link_bytes=[1e9, 64e9]), "goodput")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1G", "64G"]
    axes = drawn(made(victim=["last", "most"]), "goodput")
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == ["victim last", "victim most"] and not axes.lines


def test_what_has_no_value_is_said_and_no_picture_is_empty():
    assert "no run has a value" in [
        text.get_text() for text in drawn(made(pages=[1, 2]), "hit_rate").texts
    ]
    axes = drawn(made(victim=["last", "most"]), "hit_rate")
    assert [text.get_text() for text in axes.texts] == ["no value", "no value"]


def test_every_run_has_its_row_of_lifetimes_or_a_note():
    runs = made(pages=range(1, 10))
    for run in runs[1:]:
        run["lifetimes"] = [0, 1, *[0] * 20, run["pages"], 0, 0, 0]
    axes = Figure().subplots()
    _charts._lifetimes(axes, runs, "title")
    texts = [tick.get_text() for tick in axes.get_yticklabels()]
    assert texts == ["1 pages: no page was given up", *(f"{n} pages" for n in range(2, 10))]
    (picture,) = axes.images
    assert picture.get_array().sum(1).tolist() == pytest.approx([0] + [1] * 8)


def test_a_page_without_lifetimes_says_so_and_names_the_costs(tmp_path):
    page = write_page(tmp_path, made(pages=[1, 2]), "a <command>", ["nobody & nothing"]).read_text()
    assert "No page was given up" in page and "a &lt;command&gt;" in page
    assert "nobody &amp; nothing" in page and "a card" in page and "a model" in page
    assert "nan" not in re.sub('base64,[^"]*', "", page)
