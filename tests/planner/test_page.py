"""The planner's page: what it must have, and, where a browser is installed, how it is laid out."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from dtcp.distributed.mesh import Degrees
from dtcp.models import gemma4
from dtcp.planner.cluster import cluster_of
from dtcp.planner.page import write_page
from dtcp.planner.search import Planner
from dtcp.planner.subject import FamilyModel
from dtcp.planner.workload import Workload
from dtcp.sequence.documents import Documents
from tests.harness.run_script import run_process

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
VOID = ("meta", "br")

MEASURE = """<script>
const pictures = [...document.querySelectorAll('figure svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const outside = [...svg.querySelectorAll('text')].filter(text => {
    const at = text.getBoundingClientRect();
    return at.left < box.left - 1 || at.right > box.right + 1 || at.top < box.top - 1
        || at.bottom > box.bottom + 1;
  }).map(text => text.textContent);
  return {width: box.width, height: box.height, outside};
});
document.title = JSON.stringify({pictures, wide: document.documentElement.scrollWidth});
</script>"""


class Outline(HTMLParser):
    """Tags that are open, texts of each picture and caption, and what is fetched from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.captions, self.texts, self.fetched = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        self.fetched += [value for name, value in attrs if name == "xlink:href"]
        if tag == "figure":
            self.captions.append("")
            self.texts.append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "figcaption" in self.open:
            self.captions[-1] += data
        elif "text" in self.open or "tspan" in self.open:
            self.texts[-1].append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of a small Gemma on eight GPUs, in two kinds of layers, with packed documents."""
    path = tmp_path_factory.mktemp("page") / "plan.html"
    documents = Documents(((3000, 700, 396),), 4096)
    subject = FamilyModel("gemma4 <tiny>", "gemma4", gemma4.tiny())
    planner = Planner(subject, cluster_of("8xH100"), Workload(documents, 2))
    search = planner.search_mesh(Degrees(cp=8))
    write_page(path, planner.workload, planner.cluster, search)
    return path


@pytest.mark.slow
def test_the_plans_page_explains_every_picture_and_fetches_nothing(page):
    outline = Outline()
    outline.feed(page.read_text())
    assert not outline.open and len(outline.captions) == 6
    assert all(len(caption) > 40 for caption in outline.captions)
    # Each has a title, and says what its axes count.
    units = ("token of the row", "TFLOP", "GB per step", "milliseconds", "GB (a H100", "tokens/s")
    for unit, texts in zip(units, outline.texts, strict=True):
        assert any(unit in text for text in texts) and len(texts) > 5
    assert all(each.startswith(("#", "data:")) for each in outline.fetched)
    assert page.stat().st_size < 200_000
    assert len(list(page.parent.glob("plan_*.png"))) == 6


@pytest.mark.slow
def test_the_plans_page_has_all_letters_inside_its_pictures(page):
    """In a headless browser, where this machine has one."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    measured = page.with_name("measured.html")
    measured.write_text(page.read_text().replace("</body>", f"{MEASURE}</body>"))
    if browser is None:
        assert "viewBox" in measured.read_text()
        return
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,800")
    command = (browser, *options, "--dump-dom", measured.as_uri())
    ended = run_process(*command, seconds=60)
    found = json.loads(re.search("<title>(.*?)</title>", ended.printed)[1])
    assert found["wide"] <= 1000 and len(found["pictures"]) == 6
    for picture in found["pictures"]:
        assert picture["width"] > 400 and picture["height"] > 100 and picture["outside"] == []
