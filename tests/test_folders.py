"""Folders of images as people have them: what counts, what is told, and a part to validate on."""

import dataclasses
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from conftest import summary, train
from PIL import Image

from timm_sfr import UserError
from timm_sfr.cli.main import main
from timm_sfr.config import DataConfig
from timm_sfr.data import summary as data_summary
from timm_sfr.data.datasets import open_split, open_splits
from timm_sfr.data.folders import SPLIT_FILE, choose_split, read_split, scan_folder, write_split
from timm_sfr.data.images import ImageReading
from timm_sfr.data.samples import Decoded

SMALL = ("--model", "resnet20_cifar", "--img-size", 16, "--epochs", 1, "-j", 0, "--device", "cpu")


def picture(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (number % 256, number // 256, 7)).save(path)


@pytest.fixture
def messy(tmp_path):
    """A folder with all that lies about: endings, hidden files, a link to itself, an empty class."""
    root = tmp_path / "messy"
    for index in range(12):
        picture(root / "train" / ("cat" if index < 8 else "dog") / f"{index}{('.png', '.WEBP', '.bmp')[index % 3]}", index)
    for index in range(4):
        picture(root / "val" / ("cat" if index < 3 else "dog") / f"{index}.png", 100 + index)
    shutil.copy(root / "train/cat/0.png", root / "val/cat/again.png")
    for name in ("train/cat/notes.txt", "train/cat/more.TXT", "train/README", "train/.DS_Store"):
        (root / name).write_text("x")
    picture(root / "train/.ipynb_checkpoints/0.png")
    picture(root / "train/__MACOSX/cat/0.png")
    picture(root / "train/outside.png")
    (root / "train/empty").mkdir()
    (root / "train/dog/loop").symlink_to(root / "train")
    return root


def test_nothing_is_passed_over_without_a_word(messy):
    scan = scan_folder(messy / "train")
    assert scan.counts == {"cat": 8, "dog": 4} and scan.classes == ("cat", "dog") and scan.loose == 1
    assert scan.other == {".txt": 2, "": 1} and scan.empty == ("empty",)
    assert set(scan.hidden) == {".DS_Store", ".ipynb_checkpoints", "__MACOSX"}
    train_split, val_split = open_splits(DataConfig(data_dir=str(messy)), "RGB", 0)
    assert len(train_split.dataset) == 12 and train_split.class_names == ("cat", "dog")
    lines = "\n".join(data_summary.lines(train_split, val_split))
    assert "12 images in 2 classes, 4 (dog) to 8 (cat) each, median 6; val has 5 images in 2 classes" in lines
    assert "2 .txt, 1 without an ending, 1 outside of a class's folder, 3 hidden" in lines and "1 folder without images" in lines
    assert "1 image of val also in train, such as val/cat/again.png = train/cat/0.png" in lines
    facts = data_summary.facts(train_split, val_split)
    assert facts["train"]["images"] == 12 and "2 .txt" in facts["train"]["passed_over"]


def test_the_command_shows_all_of_it(messy, command):
    out = command("data", messy)
    for text in ("cat    8      4", "dog    4      1", "all    12     5", "passed over: 2 .txt", "val and in train", "PNG RGB"):
        assert text in out, out
    found = json.loads(command("data", messy, "--json"))
    assert found["classes"] == {"cat": {"train": 8, "val": 4}, "dog": {"train": 4, "val": 1}} and found["train"]["loose"] == 1


def test_links_are_followed_once(tmp_path, monkeypatch):
    picture(tmp_path / "real" / "0.png")
    (tmp_path / "set").mkdir()
    for name in ("a", "b"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "real")
    assert scan_folder(tmp_path / "set").counts == {"a": 1, "b": 1}, "two names of one folder are two classes"
    monkeypatch.chdir(tmp_path / "set")
    assert scan_folder(Path(".")).counts == scan_folder(Path("../set")).counts == {"a": 1, "b": 1}
    for name, other in (("c", "d"), ("d", "c")):
        picture(tmp_path / "set" / name / "0.png")
        (tmp_path / "set" / name / f"to_{other}").symlink_to(tmp_path / "set" / other)
    assert sum(scan_folder(tmp_path / "set").counts.values()) == 6, "each way to an image once"


def test_a_link_to_nothing_is_told_as_an_image_that_does_not_decode(tmp_path):
    flat(tmp_path / "set" / "train", ant=20, bee=20)
    flat(tmp_path / "set" / "val", ant=2, bee=2)
    (tmp_path / "set/train/ant/gone.png").symlink_to(tmp_path / "nowhere.png")
    words = (*SMALL, "--data-dir", tmp_path / "set", "--output", tmp_path)
    assert "gone.png" in train(*words, ok=False).stderr
    train(*words, "--on-bad-image", "skip")


def test_a_tar_may_lack_classes_too(tmp_path):
    for split, counts in (("train", {"ant": 4, "bee": 4, "cat": 4}), ("val", {"ant": 1, "cat": 2}), ("odd", {"eel": 1})):
        flat(tmp_path / split, **counts)
        with tarfile.open(tmp_path / f"{split}.tar", "w") as file:
            file.add(tmp_path / split, arcname=".")
    config = DataConfig(data_dir=str(tmp_path), train_split="train.tar", val_split="val.tar")
    train_split, val_split = open_splits(config, "RGB", 0)
    assert sorted(val_split.dataset.reader.targets) == [0, 2, 2] and val_split.class_names == train_split.class_names
    assert {Decoded(val_split.dataset, ImageReading()).target(index) for index in range(3)} == {0, 2}
    with pytest.raises(UserError, match="val has 1 class that training does not have"):
        open_splits(dataclasses.replace(config, val_split="odd.tar"), "RGB", 0)


def test_a_run_is_scored_on_other_data_than_its_own(tmp_path, command):
    root, other = flat(tmp_path / "flat", cat=40, dog=30), tmp_path / "other"
    train(*SMALL, "--data-dir", root, "--val-share", 0.2, "--output", tmp_path, "--experiment", "run")
    shutil.copytree(root, other)
    flat(tmp_path / "splits" / "validation", dog=3)
    for place, count in ((other, 14), (tmp_path / "splits", 3)):
        words = ("validate", tmp_path / "run", "--data-dir", place, "--json", "--device", "cpu", "-j", 0)
        assert json.loads(command(*words))["images"] == count


def flat(root, **counts):
    for name, count in counts.items():
        for index in range(count):
            picture(root / name / f"{index}.png", index)
    return root


def test_a_folder_without_splits_is_split_by_class(tmp_path):
    root = flat(tmp_path / "flat", cat=50, dog=21, rare=2, single=1)
    train_split, val_split = open_splits(DataConfig(data_dir=str(root)), "RGB", 0)
    assert val_split.scan.counts == {"cat": 5, "dog": 2, "rare": 1} and train_split.chosen
    assert train_split.scan.counts == {"cat": 45, "dog": 19, "rare": 1, "single": 1}
    assert not set(train_split.scan.images) & set(val_split.scan.images) and val_split.class_names == train_split.class_names
    assert data_summary.missing_in_val(train_split.scan, val_split.scan) == ["single"]
    again = open_splits(DataConfig(data_dir=str(root)), "RGB", 0)[1]
    other = open_splits(DataConfig(data_dir=str(root)), "RGB", 1)[1]
    assert again.scan.images == val_split.scan.images != other.scan.images
    assert open_splits(DataConfig(data_dir=str(root), val_share=0.5), "RGB", 0)[1].scan.counts["cat"] == 25
    (tmp_path / "only").mkdir()
    root.rename(tmp_path / "only" / "train")
    half = DataConfig(data_dir=str(tmp_path / "only"), val_share=0.5)
    assert open_splits(half, "RGB", 0)[0].scan.counts["cat"] == 25
    flat(tmp_path / "only" / "val", cat=1)
    with pytest.raises(UserError, match=r"val-share: .* has a validation split, 'val'; leave the option out"):
        open_splits(half, "RGB", 0)


def test_a_run_keeps_its_list_of_files(tmp_path):
    root = flat(tmp_path / "flat, with a comma", cat=40, dog=30)
    words = (*SMALL, "--data-dir", root, "--output", tmp_path, "--experiment", "run")
    done = train(*words)
    assert "batch size 32: the 63 training images do not fill one of 128" in done.stdout
    assert "taken from the training images by --seed" in done.stdout
    run = tmp_path / "run"
    scan = scan_folder(root)
    parts = choose_split(scan, 0.1, 42)
    assert [part.images for part in read_split(run / SPLIT_FILE, scan)] == [part.images for part in parts]
    val = {path for path, _ in parts[1].images}
    rows = (run / "predictions.csv").read_text().splitlines()[1:]
    assert len(rows) == len(val) == 7
    for index in range(40, 60):  # files that come later belong to neither part
        picture(root / "cat" / f"{index}.png", index)
    done = train("--resume", run, "--epochs", 2)
    assert "63/7 train/val images" in done.stdout and "20 that are not in the run's split.csv" in done.stdout
    config = DataConfig(data_dir=str(root))
    assert {path for path, _ in open_split(config, "val", "RGB", 42, listed=run / SPLIT_FILE).scan.images} == val
    trained = next(path for path, name in parts[0].images if name == "dog")
    Path(trained).unlink()
    assert main(["validate", str(run), "--device", "cpu", "-j", "0"]) == 0, "it needs the images to validate on alone"
    done = train("--resume", run, "--epochs", 3, ok=False)
    assert "1 of the 70 files in" in done.stderr and Path(trained).name in done.stderr and len(done.stderr.splitlines()) == 1
    assert len(summary(run)) == 2


def test_the_list_is_the_same_however_it_is_read(tmp_path):
    scan = scan_folder(flat(tmp_path / "flat", cat=10, dog=10))
    parts = choose_split(scan, 0.3, 7)
    write_split(tmp_path / "list.csv", dict(zip(("train", "val"), parts, strict=True)))
    backwards = choose_split(type(scan)(scan.root, scan.images[::-1]), 0.3, 7)
    assert [set(part.images) for part in backwards] == [set(part.images) for part in parts]
    assert [part.images for part in read_split(tmp_path / "list.csv", scan)] == [part.images for part in parts]


def test_names_of_files_need_not_be_utf8(tmp_path):
    root = flat(tmp_path / "flat", cat=10, dog=10)
    os.rename(root / "cat/0.png", os.path.join(os.fsencode(root), b"cat/caf\xe9.png"))
    scan = scan_folder(root)
    parts = choose_split(scan, 0.3, 7)
    write_split(tmp_path / "list.csv", dict(zip(("train", "val"), parts, strict=True)))
    assert [part.images for part in read_split(tmp_path / "list.csv", scan)] == [part.images for part in parts]


def test_names_of_classes_are_utf8(tmp_path):
    """A model's configuration, its report and its card name them."""
    root = flat(tmp_path / "flat", cat=10, dog=10)
    table = tmp_path / "table.csv"
    table.write_bytes(
        b"image,label,split\n" + b"".join(b"flat/cat/%d.png,S\xe4ge,%s\n" % (i, (b"train", b"val")[i % 2]) for i in range(9))
    )
    with pytest.raises(UserError, match=r"expected names of classes in UTF-8; got 'S\\udce4ge' in .* save the table as UTF-8"):
        open_splits(DataConfig(dataset=f"csv/{table}"), "RGB", 0)
    os.rename(root / "dog", os.path.join(os.fsencode(root), b"S\xe4ge"))
    with pytest.raises(UserError, match=r"got 'S\\udce4ge' in .*; rename the folder"):
        open_splits(DataConfig(data_dir=str(root)), "RGB", 0)


def test_class_maps_are_checked(tmp_path):
    root = flat(tmp_path / "flat", cat=10, dog=10, ship=10)
    config = DataConfig(data_dir=str(root), class_map=str(tmp_path / "map.txt"))
    with pytest.raises(UserError, match="class-map: cannot read"):
        open_splits(config, "RGB", 0)
    mistakes = {"cat\ndgo\nship\n": "got none for 'dgo'; did you mean 'dog'", "cat\ncat\ndog\n": "'cat' a second time on line 2",
                "cat\n\ndog\n": "a blank line on line 2"}  # fmt: skip
    for text, said in mistakes.items():
        (tmp_path / "map.txt").write_text(text)
        with pytest.raises(UserError, match=said):
            open_splits(config, "RGB", 0)
    (tmp_path / "map.txt").write_bytes("\ufeffship\r\ncat\r\n\r\n".encode())
    train_split, val_split = open_splits(config, "RGB", 0)
    assert train_split.class_names == val_split.class_names == ("ship", "cat")
    assert train_split.scan.left_out == 10 and len(train_split.dataset) == 18
    assert "10 images of classes that the class map leaves out" in "\n".join(data_summary.lines(train_split, val_split))


def test_what_is_wrong_with_a_small_folder_is_said(tmp_path):
    for counts, said in (({"a": 1, "b": 1}, "every class in .* has a single image"), ({"solo": 9}, "got 'solo' alone")):
        with pytest.raises(UserError, match=said):
            open_splits(DataConfig(data_dir=str(flat(tmp_path / f"few{len(counts)}", **counts))), "RGB", 0)


def test_val_may_lack_classes_and_has_trains_numbers(tmp_path):
    flat(tmp_path / "train", ant=4, bee=4, cat=4)
    flat(tmp_path / "val", cat=3)
    train_split, val_split = open_splits(DataConfig(data_dir=str(tmp_path)), "RGB", 0)
    assert [target for _, target in val_split.dataset.reader.samples] == [2, 2, 2]
    assert val_split.class_names == train_split.class_names
    assert "val has no images of 2 classes: ant, bee" in "\n".join(data_summary.lines(train_split, val_split))
    flat(tmp_path / "val", cta=1)
    with pytest.raises(UserError, match=r"val has 1 class that training does not have: .'cta'."):
        open_splits(DataConfig(data_dir=str(tmp_path)), "RGB", 0)


def test_more_classes_than_the_data_has(tmp_path):
    """The names that are known stay, and the run is scored as it was in training."""
    flat(tmp_path / "set" / "train", ant=20, bee=20)
    flat(tmp_path / "set" / "val", ant=5, bee=5)
    train(*SMALL, "--data-dir", tmp_path / "set", "--num-classes", 4, "--output", tmp_path, "--experiment", "run")
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["label_names"] == ["ant", "bee", "class 2", "class 3"]
    assert main(["validate", str(tmp_path / "run"), "--device", "cpu"]) == 0
