"""For `make site`: the README is the first page; links to other files lead to the repository."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent


def on_files(files: Any, config: Any) -> Any:
    """Add the README as the first page; its links to pages lose their folder."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links to what is no page at the repository."""
    markdown = markdown.replace("](../README.md", "](index.md")
    names = "CONTRIBUTING.md|CHANGELOG.md|CITATION.cff|LICENSE|results/[^)]*|recipes/[^)]*"
    return re.sub(rf"\]\((?:\.\./)?({names})\)", rf"]({config.repo_url}/blob/main/\1)", markdown)
