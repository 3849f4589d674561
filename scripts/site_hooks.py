"""What mkdocs does beside its own: docstrings' roles become plain code, and pages that are still to be written are left out."""

import re
from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """The navigation without pages that no file stands for; tests/test_docs_site.py holds which those may be."""
    for section in config.nav:
        for name, pages in section.items():
            if isinstance(pages, list):
                section[name] = [page for page in pages if (Path(config.docs_dir) / page).is_file()]
    return config


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """A link to such a page as plain words; tests/test_docs.py finds links that lead nowhere for another reason."""

    def plain(match: re.Match[str]) -> str:
        return match[0] if (Path(config.docs_dir) / match[2]).is_file() else match[1]

    return re.sub(r"\[([^\]]+)\]\(([\w-]+\.md)(?:#[\w-]+)?\)", plain, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """``:class:`Sampling` `` of a docstring: Markdown knows no roles."""
    return re.sub(r":(?:class|func|meth|mod|data):(<code|<a)", r"\1", html)
