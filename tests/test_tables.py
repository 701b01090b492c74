"""Data from a CSV or Parquet file of image paths and labels."""

import csv
import json

import pytest
from conftest import train
from PIL import Image

from timm_sfr import UserError
from timm_sfr.config import DataConfig
from timm_sfr.data import summary, tables
from timm_sfr.data.datasets import open_splits, open_test, open_validation
from timm_sfr.data.folders import SPLIT_FILE

TINY = ("--model", "resnet20_cifar", "--img-size", 16, "--epochs", 1, "-b", 16, "-j", 0, "--device", "cpu")


def images(root, **counts):
    """Image files NAME-NUMBER.png; their paths and classes."""
    rows = []
    for name, count in counts.items():
        for number in range(count):
            root.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (number, len(name), ord(name[0]))).save(root / f"{name}-{number}.png")
            rows.append((f"{root.name}/{name}-{number}.png", name))
    return rows


def write(path, header, rows, delimiter=","):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def opened(path, **options):
    """The splits train, val and test of a table, as far as there are any."""
    config = DataConfig(dataset=f"csv/{path}", **options)
    train_split, val_split = open_splits(config, "RGB", 0)
    return train_split, val_split, open_test(config, "RGB", 0, train_split.class_names)


def counts(split):
    return dict(split.scan.counts)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("header", [("image", "label"), ("path", "class"), ("file", "target"), ("file_name", "label")])
def test_columns_and_delimiters(header, delimiter, tmp_path):
    rows = [(path, f"{name}, {name}") for path, name in images(tmp_path / "i", cat=10, dog=10)]
    for index in range(1, len(rows), 2):
        rows.insert(index, rows.pop(index))
    train_split, val_split, test = opened(write(tmp_path / "t.csv", header, rows, delimiter))
    assert train_split.class_names == ("cat, cat", "dog, dog") and test is None and train_split.chosen
    assert counts(train_split) == {"cat, cat": 9, "dog, dog": 9} and counts(val_split) == {"cat, cat": 1, "dog, dog": 1}


def test_the_split_column_and_what_is_passed_over(tmp_path):
    rows = images(tmp_path / "i", cat=10, dog=10)
    names = ["train"] * 6 + ["valid"] * 2 + ["test", "test"]
    path = write(tmp_path / "t.csv", ("label", "more", "split", "path"), [(name, 1, names[i % 10], file)
                 for i, (file, name) in enumerate(rows)])  # fmt: skip
    train_split, val_split, test = opened(path)
    assert (counts(train_split), counts(val_split), test) == ({"cat": 6, "dog": 6}, {"cat": 2, "dog": 2}, None)
    assert "train passes over 4 images of split 'test'" in "\n".join(summary.lines(train_split, val_split))
    train_split, val_split, test = opened(path, test_split="test")
    assert counts(test) == {"cat": 2, "dog": 2} and not train_split.scan.passed_over() and not train_split.chosen
    assert not set(test.scan.images) & {*train_split.scan.images, *val_split.scan.images}
    swapped = opened(path, train_split="test", val_split="train")
    assert (counts(swapped[0]), counts(swapped[1])) == ({"cat": 2, "dog": 2}, {"cat": 6, "dog": 6})
    config = DataConfig(dataset=f"csv/{path}", val_split="test")
    (tmp_path / "i" / "cat-0.png").unlink()
    assert len(open_validation(config, "RGB", 0, ("ant", "cat", "dog")).dataset) == 4, "other splits' files are not needed"


def test_labels_are_names_or_integers_and_a_class_map_works(tmp_path):
    files = [path for path, _ in images(tmp_path / "i", x=36)]
    path = write(tmp_path / "t.csv", ("image", "label"), [(file, i % 12) for i, file in enumerate(files)])
    train_split = opened(path)[0]
    assert train_split.class_names == tuple(map(str, range(12)))
    assert {int(name): target for (_, name), (_, target) in zip(
        train_split.scan.images, train_split.dataset.reader.samples, strict=True)} == {k: k for k in range(12)}  # fmt: skip
    (tmp_path / "map.txt").write_text("11\n3\n")
    mapped = opened(path, class_map=str(tmp_path / "map.txt"))[0]
    assert mapped.class_names == ("11", "3") and counts(mapped) == {"11": 2, "3": 2} and mapped.scan.left_out == 30


def test_parquet_and_another_folder(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = images(tmp_path / "far" / "i", cat=5, dog=5)
    for name, labels in (("names", [name for _, name in rows]), ("numbers", [float(name == "dog") for _, name in rows])):
        whole = pyarrow.table({"image": [path for path, _ in rows], "label": labels, "split": ["train", "val"] * 5})
        parquet.write_table(whole, tmp_path / f"{name}.parquet")
        split = opened(tmp_path / f"{name}.parquet", data_dir=str(tmp_path / "far"))[0]
        assert split.class_names == (("cat", "dog") if name == "names" else ("0", "1")) and len(split.dataset) == 5
    relative = DataConfig(dataset="csv/names.parquet", data_dir=str(tmp_path / "far"))
    (tmp_path / "names.parquet").rename(tmp_path / "far" / "names.parquet")
    assert len(open_splits(relative, "RGB", 0)[1].dataset) == 5, "the file may lie in --data-dir"
    parquet.write_table(pyarrow.table({"image": [{"bytes": b"x"}], "label": [1]}), tmp_path / "bytes.parquet")
    with pytest.raises(UserError, match=r"row 1: expected text or an integer in column 'image'; .* hfds/FOLDER"):
        opened(tmp_path / "bytes.parquet")
    parquet.write_table(pyarrow.table({"image": ["a", None], "label": [1, 2]}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match="row 2: column 'image' is empty"):
        opened(tmp_path / "none.parquet")
    (tmp_path / "not.parquet").write_text("junk")
    with pytest.raises(UserError, match="cannot read"):
        opened(tmp_path / "not.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'pip install "timm-sfr\[hfds\]"'):
        opened(tmp_path / "bytes.parquet")


@pytest.mark.parametrize(
    "text,options,said",
    [
        ("image,lable\ni/a-0.png,a\n", {}, "no column of labels: expected label or class or target; got 'image', 'lable'; give "
                                           "--target-key NAME"),
        ("image,lable\ni/a-0.png,a\n", {"target_key": "labl"}, "expected labl; got 'image', 'lable'; did you mean 'lable'?"),
        ("image,label\ni/a-0.png,a\ni/a-1.png,\n", {}, "t.csv', line 3: column 'label' is empty"),
        ("image,label\n,a\n", {}, "line 2: column 'image' is empty"),
        ("image,label\ni/a-0.png\n", {}, "line 2: expected 2 cells, as in line 1; got 1"),
        ("image,label\ni/a-0.png,a\n\ni/a-9.png,a\ni/b-0.png,b\ni/b-9.png,b\n", {},
         "2 images of 'FILE' missing: i/a-9.png (line 4), i/b-9.png (line 6)"),
        ("image,label\ni/a-0.png,a\ni/a-0.png,b\n", {}, "line 3: 'i/a-0.png' has the label 'b' here and 'a' in line 2"),
        ("image,label,split\ni/a-0.png,a,trian\n", {}, "line 2: unknown split 'trian'; did you mean 'train'"),
        ("image,label,split\ni/a-0.png,a,\n", {}, "line 2: empty split; expected one of"),
        ("image,label,split\ni/a-0.png,a,train\n", {}, "val-split: expected rows of split 'validation' (any of eval, "),
        ("image,label,split\ni/a-0.png,a,val\n", {}, "train-split: expected rows of split 'train'"),
        ("image,label,split\ni/a-0.png,a,train\ni/a-1.png,a,val\n", {"test_split": "test"},
         "test-split: expected rows of split 'test'"),
        ("image,label,split\ni/a-0.png,a,train\ni/a-1.png,a,val\n", {"test_split": "valid"},
         "test-split: 'valid' means the val split 'validation' too"),
        ("image,label,split\ni/a-0.png,a,train\ni/a-1.png,a,val\n", {"val_share": 0.5},
         "val-share: 'FILE' has rows of a validation split"),
        ("image,label,split\ni/a-0.png,a,train\ni/b-0.png,b,val\n", {}, "val has 1 class that training does not have: ['b']"),
        ("image,label\ni/a-0.png,a\ni/b-0.png,b\n", {}, "every class in"),
        ("image,label\ni/a-0.png,a\n", {"val_split": "mine"},
         "expected rows of split 'mine' (any of mine) in 'FILE'; it has no column"),
        ("image,label\n", {}, "has no rows"),
        (f'image,"{"x" * 140000}\n', {}, "line 1: field larger than field limit"),
        ("", {}, "has no column of image paths"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line_with_file_and_row(text, options, said, tmp_path):
    images(tmp_path / "i", a=2, b=2)
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        opened(path, **options)
    assert said.replace("FILE", str(path)) in str(error.value) and "\n" not in str(error.value)


def test_missing_tables_and_folders(tmp_path, command):
    (tmp_path / "t.csv").write_text("image,label\n")
    for dataset, data_dir, said in (("csv/", None, "expected csv/FILE"), (f"csv/{tmp_path}/tt.csv", None, "did you mean"),
                                    (f"csv/{tmp_path}/t.csv", "/does/not", "there is no folder '/does/not'")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            open_splits(DataConfig(dataset=dataset, data_dir=data_dir), "RGB", 0)
    assert "--dataset csv/FILE" in command("data", tmp_path / "t.csv", status=2)
    assert "data-dir: it is for" in command("data", tmp_path, "--data-dir", "x", status=2)


def test_the_command_shows_a_table(table, command):
    out = command("data", f"csv/{table}", "--test-split", "test")
    assert "class  train  val  test" in out and "all    200    50   40" in out
    found = json.loads(command("data", f"csv/{table}", "--json"))
    assert found["classes"]["7"] == {"train": 20, "val": 5} and found["train"]["other_splits"] == {"test": 40}


def test_a_run_on_a_table_without_splits_keeps_its_list(tmp_path, command):
    rows = images(tmp_path / "i", cat=20, dog=20)
    path = write(tmp_path / "t.csv", ("image", "label"), rows)
    done = train(*TINY, "--dataset", f"csv/{path}", "--output", tmp_path, "--experiment", "run")
    assert "taken from the training images by --seed" in done.stdout
    listed = (tmp_path / "run" / SPLIT_FILE).read_text()
    more = images(tmp_path / "i", cat=21, dog=21)
    write(path, ("image", "label"), more)
    done = train("--resume", tmp_path / "run", "--epochs", 2)
    assert "36/4 train/val images" in done.stdout and "2 that are not in the run's split.csv" in done.stdout
    assert (tmp_path / "run" / SPLIT_FILE).read_text() == listed
    assert json.loads(command("validate", tmp_path / "run", "--json", "--device", "cpu"))["images"] == 4
    # A run's list is itself such a table.
    kept = opened(tmp_path / "run" / SPLIT_FILE, data_dir=str(tmp_path))
    assert (len(kept[0].dataset), len(kept[1].dataset)) == (36, 4)


def test_a_long_table_lists_each_folder_once(tmp_path, monkeypatch):
    rows = images(tmp_path / "i", cat=30, dog=30)
    asked = []
    monkeypatch.setattr(tables.os, "listdir", lambda folder, real=tables.os.listdir: (asked.append(folder), real(folder))[1])
    opened(write(tmp_path / "t.csv", ("image", "label"), rows))
    assert asked == [str(tmp_path / "i")]
