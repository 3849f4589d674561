"""What mkdocs does beside its own: docstrings' roles become plain code, and the navigation leaves out what is not there."""

import re
from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Pages of the navigation that no file stands for are left out; tests/test_docs_site.py names those that may be."""
    for section in config.nav:
        for name, pages in section.items():
            if isinstance(pages, list):
                section[name] = [page for page in pages if (Path(config.docs_dir) / page).is_file()]
    return config


def on_page_content(html: str, **_: Any) -> str:
    """``:class:`Sampling` `` of a docstring: Markdown knows no roles."""
    return re.sub(r":(?:class|func|meth|mod|data):(<code|<a)", r"\1", html)
