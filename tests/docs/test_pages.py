"""Pages name what exists, pictures show what is computed, and the site needs no network."""

import importlib
import re
import subprocess
import sys

import pytest

import dtcp
import dtcp.check
import dtcp.checkpoint
import dtcp.cp_utils
import dtcp.experts
import dtcp.huggingface
import dtcp.parallelize
import dtcp.recurrent
import dtcp.softmax
import dtcp.sparse
import dtcp.trainers
from docs.draw import PICTURES
from docs.draw.canvas import digest
from dtcp.check import CHECKS
from dtcp.pretrain.configs import llama_tiny
from tests.docs.blocks import PAGES, ROOT

API = sorted((ROOT / "docs/api").glob("*.md"))
NAMED = [name for page in API for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)]


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
def test_paths_and_links_of_a_page_exist(page):
    text = (ROOT / page).read_text()
    paths = re.findall(r"`((?:dtcp|parallelize|models|docs|benchmarks|tests)/[\w/]+\.\w+)`", text)
    links = [link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) if link]
    missing = [path for path in paths if not (ROOT / path).exists()]
    missing += [link for link in links if not ((ROOT / page).parent / link).exists()]
    # Decisions speak of files as they were.
    assert missing == [] or page == "docs/decisions.md"


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
def test_headings_of_a_page_stand_apart(page):
    prose = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
    assert re.findall(r"[^\n]\n(#+ .*)", prose) == []


def test_decisions_come_newest_first():
    dates = re.findall(r"^## (\S+):", (ROOT / "docs/decisions.md").read_text(), re.M)
    assert dates and dates == sorted(dates, reverse=True)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES if page.name != "README.md"]
    assert [page for page in pages if f": {page}" not in navigation] == []


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_shows_what_the_library_computes(name):
    """Drawn anew by `python -m docs.draw` where it does not."""
    drawn = (ROOT / f"docs/pictures/{name}.svg").read_text()
    assert re.findall(r"data ([0-9a-f]{16})", drawn) == [digest(PICTURES[name].data())]


def test_every_picture_is_on_a_page():
    shown = set(re.findall(r"pictures/(\w+)\.svg", "".join(page.read_text() for page in PAGES)))
    files = {path.stem for path in (ROOT / "docs/pictures").iterdir()}
    assert shown == files == set(PICTURES)


def found(name: str) -> object:
    """The object of a dotted name, whichever part of it is a module."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return value
    raise AssertionError(name)


PACKAGES = (
    *(dtcp, dtcp.parallelize, dtcp.huggingface, dtcp.trainers, dtcp.experts, dtcp.check),
    *(dtcp.cp_utils, dtcp.checkpoint, dtcp.softmax, dtcp.recurrent, dtcp.sparse),
)


def test_the_api_reference_has_every_public_name():
    known = [found(name) for name in NAMED]
    assert all((value.__doc__ or "").strip() for value in known)
    public = [
        getattr(module, name)
        for module in PACKAGES
        for name in module.__all__
        if not name.startswith("_")
    ]
    # A union of the classes that are there, and the options of each check.
    public = [x for x in public if x not in (dtcp.parallelize.ActivationCheckpoint, CHECKS)]
    assert [value for value in public if value not in known] == []


def test_the_first_run_is_shown_with_the_strategy_that_it_names():
    """Of 4 ranks on one machine, where 2 neighbours of cp lie together."""
    strategy = llama_tiny().dtcp.attention_style("cpu").on_nodes(2)
    shown = (ROOT / "docs/index.md").read_text()
    assert f"\nstrategy    {strategy}\n" in shown


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    ran = subprocess.run(
        command,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0 and "WARN" not in ran.stderr, ran.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link)[^>]+(?:src|href)=\"(https?:[^\"]+)\"", page.read_text()
        )
        assert loaded == [], page
