"""What the site needs besides mkdocs: notebooks as pages, files from outside docs/, and the options' texts."""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for every notebook, and whatever a page links to outside docs/, under ``source/``."""
    wanted: set[str] = set()
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            _add_notebook(file, files, config)
        elif file.src_uri.endswith(".md") and "/" not in file.src_uri:
            wanted |= {_inside(path) for path in OUTSIDE.findall(file.content_string)}
    for path in sorted(wanted):
        content = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, f"source/{path}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to notebooks and to outside files into links to their pages."""
    if "/" not in page.file.src_uri:
        markdown = OUTSIDE.sub(lambda match: f"](source/{_inside(match[1])}", markdown)
    return re.sub(r"(\]\([^)\s:]*)\.ipynb\)", r"\1.md)", markdown)


def _inside(path: str) -> str:
    """A path from the top of the repository; of a folder its README."""
    path = path.rstrip("/")
    if not (ROOT / path).exists():
        raise FileNotFoundError(f"a page links to ../{path}, which is not there")
    return posixpath.join(path, "README.md") if (ROOT / path).is_dir() else path


def _add_notebook(file: File, files: Files, config: MkDocsConfig) -> None:
    name = posixpath.splitext(file.src_uri)[0]
    text, resources = MarkdownExporter().from_filename(file.abs_src_path, {"output_files_dir": Path(name).name})
    for place, content in resources["outputs"].items():
        files.append(File.generated(config, posixpath.join(posixpath.dirname(name), place), content=content))
    # A link in HTML, which `on_page_markdown` leaves alone.
    text += f'\n\n<a href="{posixpath.basename(file.src_uri)}" download>This page as a notebook</a>\n'
    files.append(File.generated(config, f"{name}.md", content=text))


class OptionText(griffe.Extension):
    """Fields made by ``option(default, "text")`` get that text as their documentation, and the default as their value."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Called for every attribute that griffe reads."""
        call = getattr(node, "value", None)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "option" and len(call.args) > 1:
            text = ast.literal_eval(call.args[1])
            attr.docstring = griffe.Docstring(text[0].upper() + text[1:] + ".", parent=attr)
            attr.value = ast.unparse(call.args[0])
