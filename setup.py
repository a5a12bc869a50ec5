"""README.md as a package index shows it: there a link relative to the repository leads nowhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?P<path>(?!https?://)[^()\s]+)\)")


def long_description(repository: str | None) -> str:
    """README.md with links to the repository's web page; without one they are text, and pictures go."""

    def link(match: re.Match[str]) -> str:
        if repository is None:
            return "" if match["image"] else match["text"]
        view = "raw" if match["image"] else "blob"
        return f"{match['image']}[{match['text']}]({repository.rstrip('/')}/{view}/HEAD/{match['path']})"

    return LINK.sub(link, (ROOT / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        long_description=long_description(project.get("urls", {}).get("Repository")),
        long_description_content_type="text/markdown",
    )
