"""The commands of a push and a load against the Hub on the loopback."""

import sys
import time

from conftest import run
from hub_server import WRITE

PICTURES = {"pictures/curves.png", "pictures/confusion.png", "pictures/reliability.png"}
FILES = {"config.json", "model.safetensors", "README.md", "args.yaml", "summary.csv", "metrics.json"} | PICTURES
STARTING = 10  # seconds that Python and the imports may take on two busy cores
PUSH = [sys.executable, "-m", "timm_sfr.cli.main", "push"]
PREDICT = [sys.executable, "-m", "timm_sfr.cli.main", "predict"]


def push(folder, repo, hub, home, *words, token=WRITE, **env):
    """What the command answers: exit status, output, the error line; never a traceback, in under half a minute."""
    started = time.monotonic()
    done = run(*PUSH, folder, repo, *words, **{**hub.env(home, token), **env})
    assert time.monotonic() - started < 30 + STARTING, "bounded"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def python(code, **env):
    done = run(sys.executable, "-c", code, **env)
    return done


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
