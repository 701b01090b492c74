"""The documents' code blocks, and the folder that they run in."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import timm
from digit_files import COUNTS, digit_files, make_parquet, make_shards, make_tars
from doc_server import ROOT, checkout, install
from hub_server import Hub
from safetensors.torch import save

PAGES = [ROOT / "README.md", ROOT / "hub_configs" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>[\w-]*)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, line, language and text."""

    page: str
    line: int
    kind: str
    code: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = path.read_text(encoding="utf-8")
    found = [
        Block(str(path.relative_to(ROOT)), text[: match.start()].count("\n") + 1, match["kind"],
              "\n".join(line.removeprefix(match["indent"]) for line in match["code"].splitlines()) + "\n")
        for match in FENCE.finditer(text)
    ]  # fmt: skip
    assert 2 * len(found) == len(re.findall(r"^ *```", text, re.MULTILINE)), f"{path}: a fence is not closed"
    return found


def shape(text: str) -> list[str]:
    """The lines of an output without its numbers, and without how wide its columns are."""
    lines = (
        re.sub(r"[+-]?\d[\d.e+-]*", "N", line).replace("N epochs", "N epoch").replace("N CPU threads", "N CPU thread")
        for line in text.splitlines()
    )
    return [" ".join(line.split()) for line in lines if line.strip()]


@dataclass
class Shell:
    """The commands of `doc_server`, a Hub, and what all pages are given: data, runs, images."""

    place: Path
    hub: Hub = field(default_factory=Hub)

    def __post_init__(self) -> None:
        slurm = {"JOB_NODELIST": "host[0-3]", "NNODES": "4", "NODEID": "1", "JOB_ID": "17"}
        self.env = {
            **os.environ,
            **self.hub.env(self.place / "home"),
            **{f"SLURM_{name}": value for name, value in slurm.items()},
            "HOME": str(self.place),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{self.place / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HF_DATASETS_CACHE": str(self.place / "datasets"),
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }
        address = str(self.place / "socket")
        install(self.place / "bin", address)
        command = [sys.executable, Path(__file__).with_name("doc_server.py"), address]
        self.server = subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, text=True)
        self.pretrained = save(timm.create_model("resnet18").state_dict())
        self.given = self.place / "given"
        checkout(self.given)
        self.make_data()
        assert self.server.stdout.readline() == "ready\n"
        for words in ("RUN", "RUN1", "RUN2 --no-sfr", "OWN --model resnet20_cifar --data-dir DIR"):
            done = self.bash(f"python train_sfr.py --experiment {words}", self.given)
            assert done.returncode == 0, done.stderr
        (self.given / "RUN").symlink_to("output/train/RUN")

    def close(self) -> None:
        self.server.terminate()
        self.server.wait()
        self.server.stdout.close()
        self.hub.close()

    def make_data(self) -> None:
        """DIR, images.csv, labels.csv, TARS, SHARDS and NAME, of the digits in six forms; pictures to predict on."""
        for split in COUNTS:
            for index, (data, label) in enumerate(digit_files(split)[:40]):
                path = self.given / "DIR" / split / str(label) / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        shutil.copytree(self.given / "DIR" / "val", self.given / "DIR" / "test")
        images = sorted((self.given / "DIR").glob("*/*/*.png"))
        rows = [f"{path.relative_to(self.given)},{path.parent.name},{path.parent.parent.name}" for path in images]
        (self.given / "images.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
        several = [row.replace(",", f",{('even', 'odd')[int(row.split(',')[1]) % 2]}|", 1) for row in rows]
        (self.given / "labels.csv").write_text("\n".join(["path,label,split", *several]) + "\n")
        for name, make in (("TARS", make_tars), ("SHARDS", make_shards), ("NAME", make_parquet)):
            (self.given / name).mkdir()
            make(self.given / name)
        (self.given / "folder").mkdir()
        (self.given / "folder" / "one.png").write_bytes(digit_files("val")[0][0])
        (self.given / "image.png").write_bytes(digit_files("val")[1][0])

    def folder(self, place: Path) -> Path:
        """A fresh folder for a page: the repository, data and runs; and an empty Hub, but for timm's weights."""
        shutil.copytree(self.given, place, symlinks=True)
        self.hub.repos.clear()
        self.hub.add("timm/resnet18.a1_in1k", {"model.safetensors": self.pretrained})
        return place

    def bash(self, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Runs a block of bash."""
        words = ["bash", "-euo", "pipefail", "-c", code]
        return subprocess.run(words, cwd=folder, env=self.env, capture_output=True, text=True, timeout=300)


class Page:
    """The Python blocks of one page, in one namespace."""

    def __init__(self, shell: Shell, folder: Path) -> None:
        self.said = (folder / ".said").open("w+")
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.said}
        self.process = subprocess.Popen([shell.place / "bin" / "doc-page"], cwd=folder, env=shell.env, text=True, **streams)

    def run(self, code: str, name: str) -> str:
        """Runs a block; its traceback, or nothing."""
        print(json.dumps([name, code]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, "the block ended Python"
        return json.loads(line)

    def output(self) -> str:
        """All that the blocks have printed."""
        return Path(self.said.name).read_text()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.said.close()
