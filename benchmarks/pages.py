"""Tables in the documents, between a line ``<!-- LABEL -->`` and a line ``<!-- end -->``."""

from __future__ import annotations

import re
from collections.abc import Sequence


def fill(text: str, label: str, body: str) -> str:
    """Returns `text` with `body` as the content of the place `label`, which is added at the end if it does not exist."""
    pattern = re.compile(rf"(<!-- {re.escape(label)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        text += f"\n## {label}\n\n<!-- {label} -->\n<!-- end -->\n"
    return pattern.sub(lambda match: match[1] + body.rstrip("\n") + "\n" + match[2], text)


def labels(text: str) -> set[str]:
    """Returns the labels of the places in `text`."""
    return set(re.findall(r"<!-- ([\w-]+) -->\n", text)) - {"end"}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> str:
    """Returns a Markdown table with the first column aligned left and the others right, or with `words` left too."""
    lines = [header, ["---", *["---" if words else "---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
