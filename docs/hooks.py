"""MkDocs hooks: pages that lie outside docs/, and links that leave it.

The same files are read in the repository and in the site. README.md is the site's first page, CHANGELOG.md,
CONTRIBUTING.md and SECURITY.md are pages too, and results' pictures are copied into it. A link to any other
file of the repository leads to its web page, if mkdocs.yml says repo_url; else it is plain text.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security-policy.md",
}
"""Files of the repository, and where they are in the site."""
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?P<path>[^()\s#:]+)(?P<anchor>#[^()\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and the pictures."""
    for source, target in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        content = relocated(text, source, target, config.get("repo_url"))
        files.append(File.generated(config, target, content=content))
    for picture in sorted((ROOT / RESULTS).rglob("*.png")):
        target = in_site(picture.relative_to(ROOT).as_posix())
        files.append(File.generated(config, target, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Relocates the links of pages in docs/."""
    target = page.file.src_uri
    if target in PAGES.values():
        return markdown
    return relocated(markdown, f"docs/{target}", target, config.get("repo_url"))


def in_site(path: str) -> str | None:
    """Where a file of the repository is in the site, if it is there."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith(f"{RESULTS}/") and path.endswith(".png"):
        return path.replace(RESULTS, "results", 1)
    return PAGES.get(path)


def relocated(text: str, source: str, target: str, repository: str | None) -> str:
    """Turns a page's links, which are relative to `source` in the repository, into those of `target`.

    A link to a file that is not there stays as it is, so that a strict build fails.
    """

    def link(match: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join(os.path.dirname(source), match["path"]))
        if not (ROOT / path).exists():
            return match[0]
        if place := in_site(path):
            relative = os.path.relpath(place, os.path.dirname(target) or ".")
            return f"{match['image']}[{match['text']}]({relative}{match['anchor'] or ''})"
        if repository:
            return f"[{match['text']}]({repository.rstrip('/')}/blob/HEAD/{path}{match['anchor'] or ''})"
        return match["text"]

    return LINK.sub(link, text)
