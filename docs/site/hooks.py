"""What of the site lies elsewhere in the repository: README is its start; and links to what is not on it."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
PAGES = {
    "README.md": "index.md", "ARCHITECTURE.md": "architecture.md", "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md", "results/README.md": "results.md",
}  # fmt: skip
PATH = re.compile(r"[\w./-]+\.md|README|results/")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Return the site's files with those pages, and the figures of results, among them."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for figure in sorted((ROOT / "results" / "figures").glob("*.png")):
        files.append(File.generated(config, f"results/figures/{figure.name}", abs_src_path=str(figure)))
    return files


def titles(nav: list[Any]) -> dict[str, str]:
    """Return what the pages of a navigation are called there."""
    found: dict[str, str] = {}
    for entry in nav:
        for title, below in entry.items():
            found |= titles(below) if isinstance(below, list) else {below: title}
    return found


def on_page_markdown(markdown: str, *, page: Any, files: Files, config: Any, **_: Any) -> str:
    """Return a page whose links lead to where things are on the site, by what they are called there.

    What is not on it is told by its name alone.
    """
    called = titles(config["nav"])
    source = {there: here for here, there in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(found: re.Match[str]) -> str:
        picture, text, target, part = found.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(there) is None:
            return text
        here = posixpath.dirname(page.file.src_uri) or "."
        if PATH.fullmatch(text):
            text = called.get(there, text)
        return f"{picture}[{text}]({posixpath.relpath(there, here)}{part or ''})"

    return LINK.sub(moved, markdown)
