"""README.md and docs/*.md: every block is run as it stands, in order, and every option in the text is one."""

import functools
import re
import sys
import textwrap
import time

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from doc_pages import PAGES, Page, Shell, blocks, shape

from benchmarks import options as option_page
from timm_sfr.cli.main import make_parser
from timm_sfr.cli.train import training_parser
from timm_sfr.config import RunConfig

# What stands in the documents for the reader's own. Other such names (DIR, RUN, TARS, ...) are those of files that are there.
PLACEHOLDERS = {
    r"\bUSER/": "user/",
    r"\bMODEL\b": "resnet20_cifar.sfr_digits",
    r"\bRANK\b": "0",
    r"\bHOST0\b": "127.0.0.1",
}
# Blocks that show something and are no command, by page and first line, and why they are not compared with an output.
SHOWN = {
    ("docs/train.md", "DIR/"): "the layout of a folder; the block behind it trains on such a one",
    ("docs/hub.md", "error: push-to-hub: USER/NAME is not published: REASON; nothing is lost; to try again: timm-sfr push RUN "
     "USER/NAME"): "the form of a message; tests/test_push_faults.py has its instances",
    ("docs/data.md", "path,label,split"): "the form of a table; docs/train.md trains on such a one",
    ("docs/logs.md", "1408 images an epoch, 44 updates in 2 epochs"): "of another run than the blocks train; "
    "tests/test_forecast.py checks the line's form",
}  # fmt: skip
# What a page's Python blocks may take as given.
GIVEN = {
    "README.md": """
        import torch
        from torch.utils.data import DataLoader
        epochs, loader = 1, DataLoader([(torch.randn(3, 224, 224), y) for y in (0, 1)], batch_size=2)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    """,
}
WARNING = re.compile(r"Warning: (?!`?torch\.jit)")  # PyTorch's, that TorchScript is on its way out; deploy.md says so
# Of torchrun, pip, pytest, docker, and the commands of trackers.
OTHERS = {"--rm", "--gpus", "--ipc", "--user", "--entrypoint", "--build-arg",
          "--nproc-per-node", "--max-restarts", "--no-deps", "--durations", "--logdir", "--project"}  # fmt: skip
NAMED = [page for page in PAGES if blocks(page)]
LONG = "docs/train.md"  # with about fifty trainings


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    shell = Shell(tmp_path_factory.mktemp("docs"))
    yield shell
    shell.close()


@pytest.fixture
def names(path, shell, tmp_path):
    """Python with what the page takes as given."""
    page = Page(shell, tmp_path / "here")
    assert not page.run(textwrap.dedent(GIVEN.get(name_of(path), "")), "given")
    yield page
    page.close()


def fill(code):
    for pattern, value in PLACEHOLDERS.items():
        code = re.sub(pattern, value, code)
    return code


@pytest.mark.parametrize("path", [pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] * (name_of(page) == LONG))
                                  for page in NAMED])  # fmt: skip
def test_every_block_runs(path, shell, tmp_path, request):
    folder, printed = shell.folder(tmp_path / "here"), ""
    names = request.getfixturevalue("names") if any(block.kind == "python" for block in blocks(path)) else None
    for block in blocks(path):
        started = time.monotonic()
        code = fill(block.code)
        if block.kind == "bash":
            place = folder
            if "git clone" in code:
                place = tmp_path / "fresh"
                place.mkdir()
            done = shell.bash(code, place)
            assert done.returncode == 0, f"{block.where}: status {done.returncode}\n{code}\n{done.stdout}\n{done.stderr}"
            assert "Traceback" not in done.stderr and not WARNING.search(done.stderr), f"{block.where}:\n{done.stderr}"
            printed = done.stdout
        elif block.kind == "python":
            before = len(names.output())
            failed = names.run(code, block.where)
            printed = names.output()[before:]
            assert not failed, f"{block.where}:\n{code}\n{failed}"
            assert not WARNING.search(printed), f"{block.where}:\n{printed}"
        elif block.kind == "yaml":
            RunConfig.from_flat(yaml.safe_load(code))
            first = code.splitlines()[0]
            assert re.fullmatch(r"# [\w-]+\.yaml", first), f"{block.where}: its first line should name a file"
            (folder / first[2:]).write_text(code)
        elif (block.page, block.code.splitlines()[0]) not in SHOWN:
            assert block.kind == "text", f"{block.where}: no rule for {block.kind!r}; run it, or list it in SHOWN with a reason"
            missing = set(shape(code)) - set(shape(printed))
            assert not missing, f"{block.where}: not what the block before it prints: {missing}\n{printed}"
        print(f"{block.where} {block.kind} {time.monotonic() - started:.1f} s", file=sys.stderr)


def test_what_is_listed_is_there():
    first = {(block.page, block.code.splitlines()[0]) for page in PAGES for block in blocks(page)}
    assert first >= SHOWN.keys() and {*map(name_of, NAMED)} >= GIVEN.keys()


@pytest.mark.slow
def test_the_commands_on_several_cpu_processes(shell, tmp_path, monkeypatch):
    monkeypatch.setitem(shell.env, "DOCS_SLOW", "1")
    folder = shell.folder(tmp_path / "here")
    lines = [line for page in PAGES for block in blocks(page) for line in block.code.splitlines()]
    commands = {line for line in lines if line.startswith("torchrun --nproc-per-node")}
    assert commands
    for command in commands:
        done = shell.bash(command, folder)
        assert done.returncode == 0 and "2 processes" in done.stdout, done.stderr


@functools.cache
def known_options():
    _, verbs = make_parser()
    parsers = [training_parser(), make_parser()[0], *verbs.values(), launch_command_parser()]
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    for path in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z][\w-]*)"', path.read_text()))
    return known | OTHERS


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_option_is_one(path):
    text = re.sub(r"^#SBATCH.*", "", path.read_text(), flags=re.MULTILINE)
    fenced = re.findall(r"^ *```.*?^ *```", text, re.MULTILINE | re.DOTALL)
    for code in [*fenced, *re.findall(r"`([^`\n]+)`", text)]:
        if code.startswith("pip "):
            continue
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            exists = flag in known_options() or (flag[-1] == "-" and any(one.startswith(flag) for one in known_options()))
            assert exists or "unrecognized arguments" in code, f"{path.name}: there is no {flag}: {code}"


def test_the_page_of_options():
    assert option_page.DOCUMENT.read_text() == option_page.render(), "run python -m benchmarks.options"
    assert option_page.TIMM.read_text() == option_page.render_timm(), "run python -m benchmarks.options"
