"""Runs the notebooks in docs/notebooks/ and saves their outputs: ``python -m benchmarks.notebooks``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "notebooks"


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Runs a notebook in `folder` from top to bottom; returns it with the new outputs; paths in them are relative.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    settings = {"timeout": 300, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    client = NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **settings)
    client.create_kernel_manager()
    with TemporaryDirectory(prefix="nb-") as place:  # sockets (in a folder with a short name) instead of open ports
        client.km.transport, client.km.ip = "ipc", f"{place}/kernel"
        client.km.connection_file = f"{place}/kernel.json"
        client.execute(env={**os.environ, "IPYTHONDIR": place, "PYDEVD_DISABLE_FILE_VALIDATION": "1"})
    text = nbformat.writes(notebook)
    for place in (ROOT, folder):
        text = text.replace(f"{place}{os.sep}", "")
    return nbformat.reads(text, nbformat.NO_CONVERT)


def main() -> int:
    """Updates the outputs; returns 0."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        with TemporaryDirectory() as folder:
            nbformat.write(executed(path, Path(folder)), path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
