"""The documents' code blocks, and the folder that they run in."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import timm
from doc_server import ROOT, checkout, install
from hub_server import Hub
from safetensors.torch import save

from timm_sfr.data.datasets import Digits

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
        inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        own = {
            "HOME": str(self.place),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{self.place / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HF_DATASETS_CACHE": str(self.place / "datasets"),
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }
        slurm = {"JOB_NODELIST": "host[0-3]", "NNODES": "4", "NODEID": "1", "JOB_ID": "17"}
        self.env = {
            **inherited,
            **self.hub.env(self.place / "home"),
            **own,
            **{f"SLURM_{k}": v for k, v in slurm.items()},
        }
        address = str(self.place / "socket")
        install(self.place / "bin", address)
        server = Path(__file__).with_name("doc_server.py")
        self.server = subprocess.Popen(
            [sys.executable, server, address], env=self.env, stdout=subprocess.PIPE, text=True
        )
        self.pretrained = save(timm.create_model("resnet18").state_dict())
        self.given = self.place / "given"
        checkout(self.given)
        self.make_data()
        assert self.server.stdout.readline() == "ready\n"
        for words in (
            "--experiment RUN", "--experiment RUN1", "--experiment RUN2 --no-sfr",
            "--experiment OWN --model resnet20_cifar --data-dir DIR",
        ):  # fmt: skip
            done = self.bash(f"python train_sfr.py {words}", self.given)
            assert done.returncode == 0, done.stderr
        (self.given / "RUN").symlink_to("output/train/RUN")

    def close(self) -> None:
        self.server.terminate()
        self.server.wait()
        self.server.stdout.close()
        self.hub.close()

    def make_data(self) -> None:
        """DIR, images.csv, labels.csv, TARS, SHARDS and NAME, of the digits in six forms; pictures to predict on."""
        import datasets

        files = {}
        for training, split, count in ((True, "train", 96), (False, "val", 40)):
            digits = Digits(training, "RGB")
            for index in range(count):
                image, label = digits[index]
                data = io.BytesIO()
                image.resize((32, 32)).save(data, "PNG")
                files[split, index] = (data.getvalue(), label)
        for (split, index), (data, label) in files.items():
            path = self.given / "DIR" / split / str(label) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if index < 40:
                path.write_bytes(data)
        shutil.copytree(self.given / "DIR" / "val", self.given / "DIR" / "test")
        images = sorted((self.given / "DIR").glob("*/*/*.png"))
        rows = [f"{path.relative_to(self.given)},{path.parent.name},{path.parent.parent.name}" for path in images]
        (self.given / "images.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
        several = [row.replace(",", f",{('even', 'odd')[int(row.split(',')[1]) % 2]}|", 1) for row in rows]
        (self.given / "labels.csv").write_text("\n".join(["path,label,split", *several]) + "\n")
        for name in ("TARS", "SHARDS", "NAME"):
            (self.given / name).mkdir()
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[*"0123456789"])})
        for split in ("train", "val"):
            mine = {index: file for (part, index), file in files.items() if part == split}
            with tarfile.open(self.given / "TARS" / f"{split}.tar", "w") as tar:
                for index, (data, label) in mine.items():
                    _put(tar, f"{label}/{index}.png", data)
            rows = [{"image": {"bytes": data, "path": None}, "label": label} for data, label in mine.values()]
            for shard in range(2):
                with tarfile.open(self.given / "SHARDS" / f"{split}-{shard:04d}.tar", "w") as tar:
                    for index, (data, label) in mine.items():
                        if index % 2 == shard:
                            _put(tar, f"{index:05d}.png", data)
                            _put(tar, f"{index:05d}.cls", str(label).encode())
                name = {"val": "validation"}.get(split, split)
                part = datasets.Dataset.from_list(rows[shard::2], features=features)
                part.to_parquet(str(self.given / "NAME" / f"{name}-{shard:05d}-of-00002.parquet"))
        (self.given / "folder").mkdir()
        (self.given / "folder" / "one.png").write_bytes(files["val", 0][0])
        (self.given / "image.png").write_bytes(files["val", 1][0])

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


def _put(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


class Page:
    """The Python blocks of one page, in one namespace."""

    def __init__(self, shell: Shell, folder: Path) -> None:
        self.said = (folder / ".said").open("w+")
        command = [shell.place / "bin" / "doc-page"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=folder, env=shell.env, stdin=pipe, stdout=pipe, stderr=self.said, text=True
        )

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


def seconds(started: float) -> str:
    """How long that took, for the log."""
    return f"{time.monotonic() - started:.1f} s"
