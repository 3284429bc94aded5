"""The site builds without a warning, and its links lead somewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


class Page(HTMLParser):
    """Identifiers of a page, and what it links to or loads."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag in ("script", "img", "link", "iframe"):
            source = found.get("src") or found.get("href")
            if source:
                self.loaded.append(source)


def broken(site):
    """Links of a site, page by page, whose file or place in a file is not there."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            is_there = target.exists()
            if is_there and parts.fragment and target in pages:
                is_there = unquote(parts.fragment) in pages[target].ids
            if not is_there:
                yield f"{path.relative_to(site.resolve())}: {link}"


def test_broken_links_are_seen(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#x">.</a><a href="b.html#y">.</a>')
    (tmp_path / "b.html").write_text('<p id="x"></p><img src="gone.png">')
    assert sorted(broken(tmp_path)) == ["a.html: b.html#y", "b.html: gone.png"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_the_sources(page):
    """Links in Markdown lead to a file of the repository, as readers of the sources follow them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        parts = urlsplit(link)
        if parts.scheme or not parts.path:
            continue
        assert (page.parent / parts.path).exists(), link


def test_pages_are_executed_as_python():
    """Every page with cells has the header that makes a notebook of it."""
    for page in PAGES:
        text = page.read_text()
        assert ("{code-cell}" in text) == text.startswith("---\nfile_format: mystnb"), page


@pytest.mark.slow
def test_the_site(tmp_path):
    """Built from nothing with every notebook executed; nothing is loaded from elsewhere."""
    pytest.importorskip("sphinx", reason="the extra `docs`")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(site)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not list(broken(site))
    pages = [Page(path) for path in site.rglob("*.html")]
    elsewhere = {link for page in pages for link in page.loaded if urlsplit(link).netloc}
    assert not elsewhere
