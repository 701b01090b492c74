"""The tree's rules: a folder imports only folders above it, and no modules import each other in a circle."""

import ast
from graphlib import TopologicalSorter

from conftest import ROOT

PACKAGE = ROOT / "timm_sfr"
# In the order of the data's way; `version` stands above all of them, the package's own `__init__` below all but `cli`.
ORDER = ["version", "utils", "method", "runs", "config", "data", "models", "reporting", "hub", "training", "__init__", "cli"]


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imported(path):
    """The package's modules that a file imports: anywhere in it, also in functions and for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module else []
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name != "timm_sfr" and not name.startswith("timm_sfr."):
                continue
            inner = name.removeprefix("timm_sfr").removeprefix(".")
            while inner and inner not in MODULES:
                inner = inner.rpartition(".")[0]
            found.add(inner or "__init__")
    return found - {name_of(path)}


def folder(module):
    return ORDER.index(module.split(".")[0])


def test_folders_import_only_folders_above_them():
    below = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in imported(path)
        if folder(other) > folder(module)
    ]
    assert not below


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter({module: imported(path) for module, path in MODULES.items()}).prepare()


def test_every_folder_says_what_happens_in_it():
    for path in PACKAGE.glob("*/__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert len(text.split()) >= 10, f"{path}: say what happens here, and in which order"
