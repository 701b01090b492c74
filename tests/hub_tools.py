"""The commands of a push and a load against the Hub on the loopback."""

import sys
import time

import torch
from conftest import COMMAND, run
from hub_server import WRITE

PICTURES = {"pictures/curves.png", "pictures/confusion.png", "pictures/reliability.png"}
FILES = {"config.json", "model.safetensors", "README.md", "args.yaml", "summary.csv", "metrics.json"} | PICTURES
STARTING = 10  # seconds that Python and the imports may take on two busy cores
PUSH = [*COMMAND, "push"]
PREDICT = [*COMMAND, "predict"]
LOGITS = """
import sys, timm, torch
{imports}
model = {create}.eval()
with torch.no_grad():
    torch.save(model(torch.load("{images}", weights_only=True)), "{out}")
print(timm.data.resolve_model_data_config(model)["mean"])
"""
WITHOUT = "sys.modules['timm_sfr'] = None"  # what is left of an environment where this package was never installed


def push(folder, repo, hub, home, *words, token=WRITE, **env):
    """What the command answers: exit status, output, the error line; never a traceback, in under half a minute."""
    started = time.monotonic()
    done = run(*PUSH, folder, repo, *words, **{**hub.env(home, token), **env})
    assert time.monotonic() - started < 30 + STARTING, "bounded"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def python(code, **env):
    return run(sys.executable, "-c", code, **env)


def logits_by(create, images, out, env, imports="import timm_sfr"):
    """What the model that `create` makes in another process says to the images, and what was printed."""
    done = python(LOGITS.format(imports=imports, create=create, images=images, out=out), **env)
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True), done.stdout


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
