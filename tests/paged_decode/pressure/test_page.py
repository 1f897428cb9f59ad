"""The page of a sweep: what is in it, and that it answers in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from paged_decode.pressure._lines import OVER_SWEEP
from paged_decode.pressure.page import write_page

from .test_charts import made

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


class Parts(HTMLParser):
    """Tags with their attributes, in order, and the texts of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self._within = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._within = tag == "script"

    def handle_data(self, data):
        if self._within:
            self.scripts.append(data)

    def handle_endtag(self, tag):
        self._within = False

    def of(self, **wanted):
        names = {name.rstrip("_").replace("_", "-"): value for name, value in wanted.items()}
        return [
            attrs
            for tag, attrs in self.tags
            if all((tag if n == "tag" else attrs.get(n)) == v for n, v in names.items())
        ]


def page_of(runs, folder):
    return write_page(folder, runs, "paged-decode pressure sweep")


def swept_runs():
    runs = made(eviction=["lru", "<b>lfu</b>"], pages=[64, 512, 4096])
    runs[0]["goodput"] = None
    return runs


def test_every_run_has_a_point_in_every_chart_where_it_has_a_value(tmp_path):
    parts = Parts(page_of(swept_runs(), tmp_path).read_text())
    assert [a["aria-label"] for a in parts.of(tag="svg")] == [title for _, title, _ in OVER_SWEEP]
    points = Counter(int(a["data-run"]) for a in parts.of(tag="g", class_="point"))
    # Of five charts one has no value at all.
    assert points == {0: 3, 1: 4, 2: 4, 3: 4, 4: 4, 5: 4}
    assert len(parts.of(tag="g", class_="line")) == 2 * len(OVER_SWEEP)
    assert sorted(int(a["data-run"]) for t, a in parts.tags if t == "tr" and "data-run" in a) == [
        *range(6)
    ]


def test_every_line_has_a_box_and_every_run_its_text(tmp_path):
    page = page_of(swept_runs(), tmp_path).read_text()
    parts = Parts(page)
    boxes = parts.of(tag="input", type="checkbox")
    assert [a["value"] for a in boxes] == ["0", "1"] and all("checked" in a for a in boxes)
    texts = json.loads(parts.scripts[0])
    assert texts[5].splitlines()[0] == "4096 pages, eviction <b>lfu</b>"
    assert "goodput: none" in texts[0] and "tokens/s: 10" in texts[5]
    assert "<b>" not in page and "no run has a value" in page


def test_the_page_is_one_file_without_links(tmp_path):
    text = page_of(swept_runs(), tmp_path).read_text()
    parts = Parts(text)
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert not any("href" in a for _, a in parts.tags) and not parts.of(tag="link")
    assert all(a["src"].startswith("data:") for _, a in parts.tags if "src" in a)


def test_one_line_needs_no_box_and_bars_are_a_picture(tmp_path):
    parts = Parts(page_of(made(pages=[1, 2]), tmp_path).read_text())
    assert parts.of(tag="svg") and not parts.of(tag="input")
    parts = Parts(page_of(made(victim=["last", "most"]), tmp_path).read_text())
    assert not parts.of(tag="svg") and len(parts.of(tag="img")) == len(OVER_SWEEP)


ASKED = """
<script>
const found = {}, at = name => document.querySelector(name);
const shown = () => getComputedStyle(at("#tip")).display;
const visible = n => getComputedStyle(at(`[data-line="${n}"]`)).display;
const point = at('.point[data-run="4"]');
found.before = shown();
point.dispatchEvent(new PointerEvent("pointerenter"));
found.over = shown();
found.tip = at("#tip").textContent;
found.row = getComputedStyle(at('tr[data-run="4"]')).backgroundColor;
found.hot = document.querySelectorAll(".point.hot").length;
const box = at("#tip").getBoundingClientRect();
found.inside = box.left >= 0 && box.top >= 0 && box.right <= innerWidth;
point.dispatchEvent(new PointerEvent("pointerleave"));
found.after = [shown(), document.querySelectorAll(".hot").length];
point.focus();
found.reached = document.activeElement === point;
point.dispatchEvent(new FocusEvent("focus"));  // a page in no window may not be told
found.focused = shown();
const second = at('.lines input[value="1"]');
second.click();
found.hidden = [visible(0), visible(1)];
at('.lines button[value="all"]').click();
found.all = [visible(0), visible(1)];
at('.lines button[value="none"]').click();
found.none = [visible(0), visible(1), second.checked];
found.sizes = [...document.querySelectorAll("svg")].map(each => each.clientWidth > 200);
document.body.setAttribute("data-found", JSON.stringify(found));
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_in_a_browser_a_point_tells_its_run_and_lines_are_hidden(tmp_path):
    path = page_of(swept_runs(), tmp_path)
    path.write_text(path.read_text() + ASKED)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    match = re.search(r'data-found="([^"]*)"', out)
    assert match, out[-2000:]
    found = json.loads(html.unescape(match[1]))
    assert (found["before"], found["over"], found["focused"]) == ("none", "block", "block")
    assert found["reached"]
    assert found["tip"].startswith("512 pages, eviction <b>lfu</b>\nfinished")
    assert found["hot"] == 4 and found["row"] == "rgb(255, 243, 196)" and found["inside"]
    assert found["after"] == ["none", 0]
    assert found["hidden"] == ["inline", "none"] and found["all"] == ["inline", "inline"]
    assert found["none"] == ["none", "none", False]
    assert found["sizes"] == [True] * len(OVER_SWEEP)
