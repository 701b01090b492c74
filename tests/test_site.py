"""The documentation site: it builds without a warning or a network, every link leads somewhere, and the notebooks run."""

import inspect
import re
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from conftest import ROOT, run

import timm_sfr
from benchmarks.notebooks import FOLDER, executed

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


class Html(HTMLParser):
    """What a page links to, what it loads by itself, its anchors, and its text from each anchor of a public name on."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors, self.words, self.silent = [], [], set(), {"": []}, 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if (given.get("id") or "").removeprefix("timm_sfr.") in timm_sfr.__all__:
            self.words[given["id"]] = []
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if given.get("src") or (tag == "link" and "canonical" not in (given.get("rel") or "")):
            self.loads.append(given.get("src") or given["href"])
        self.silent += tag in ("script", "style")

    def handle_endtag(self, tag):
        self.silent -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.silent:
            self.words[[*self.words][-1]].append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site: its pages by path."""
    folder = tmp_path_factory.mktemp("site")
    # Nothing answers at this address: a build that asked for anything would fail.
    away = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = run(*words, timeout=120, NO_MKDOCS_2_WARNING="1", **away)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder, {path: Html(path.read_text()) for path in folder.rglob("*.html")}


def test_every_link_leads_somewhere(site):
    folder, pages = site
    assert len(pages) > 20
    checked = 0
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto", "data"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file() and folder in target.parents, f"{path.name}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].anchors | {"__top"}, f"{path.name}: {link}"
            checked += 1
    assert checked > 1000


def test_nothing_comes_from_elsewhere(site):
    _, pages = site
    for path, page in pages.items():
        outside = [link for link in page.loads if urlsplit(link).netloc]
        assert not outside, f"{path.name} loads {outside}"


def test_search_finds_the_pages(site):
    index = (site[0] / "search" / "search_index.json").read_text()
    assert all(word in index for word in ("emd_l2", "--sfr-matching", "Train your own images", "confuses"))


def test_the_python_page_has_every_name(site):
    folder, pages = site
    page = pages[folder / "api.html"]
    names = [name for name in timm_sfr.__all__ if name != "__version__"]
    assert page.anchors >= {f"timm_sfr.{name}" for name in names}
    text = " ".join(word for words in page.words.values() for word in words)
    assert not re.search(r"\*\*(?! ?kwargs)|``|:\w+:`|&lt;|Args:", text), "markup shows"
    for name in names:
        # What the markup swallows (<P, C>, say) is missing from the page.
        text_of = inspect.getdoc(getattr(timm_sfr, name))
        plain = re.sub(r"^\s*(Args|Returns|Raises|Attributes|Examples):$|```\w*|[`*]", " ", text_of, flags=re.MULTILINE)
        shown = " ".join(page.words[f"timm_sfr.{name}"])
        lost = set(re.findall(r"[\w<>]{2,}", plain)) - set(re.findall(r"[\w<>]{2,}", shown))
        assert not lost, f"{name}: {lost}"


def slug(heading):
    """GitHub's anchor of a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def headings(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slug(found) for found in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def test_links_on_github():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]:
        text = re.sub(r"^ *```.*?^ *```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / parts.path).resolve() if parts.path else path
            assert target.exists() and ROOT in target.parents, f"{path.name}: {link}"
            generated = target.name == "api.md" and parts.fragment.startswith("timm_sfr")
            if parts.fragment and not generated:
                assert parts.fragment in headings(target), f"{path.name}: {link}"


def test_every_page_is_in_the_menu(site):
    folder, pages = site
    menu = set(pages[folder / "index.html"].links)
    for path in (ROOT / "docs").rglob("*"):
        if path.suffix in (".md", ".ipynb"):
            assert str(path.relative_to(ROOT / "docs").with_suffix(".html")) in menu | {"index.html"}, path


@pytest.mark.parametrize("path", [pytest.param(path, marks=pytest.mark.slow, id=path.stem)
                                  for path in NOTEBOOKS])  # fmt: skip
def test_the_notebooks_run(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    kept, fresh = nbformat.read(path, as_version=4), executed(path, tmp_path)
    for old, new in zip(kept.cells, fresh.cells, strict=True):
        said = [output for output in new.get("outputs", []) if output.get("name") == "stderr"]
        assert not said, f"{new.source}\n{said}"

        def kinds(cell):
            return [(output.output_type, *sorted(output.get("data", {}))) for output in cell.get("outputs", [])]

        assert kinds(old) == kinds(new), (
            f"the outputs that are kept are of another cell; run python -m benchmarks.notebooks\n{new.source}"
        )
    assert path.stat().st_size < 200_000, "keep the outputs small"
    assert any("image/png" in output.get("data", {}) for cell in fresh.cells for output in cell.get("outputs", []))
