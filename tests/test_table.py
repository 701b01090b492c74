"""The comparison's table against a CSV whose figures are known."""

import csv
import math

import pytest
from scipy.stats import ttest_1samp

from benchmarks import accuracy, overview, table, timing

SCORES = {"ls": (20.0, 21.0, 22.0), "sfr": (21.5, 22.0, 23.5), "ce": (19.0, 20.5, 20.0)}


@pytest.fixture
def path(tmp_path):
    place = tmp_path / "runs.csv"
    for method, scores in SCORES.items():
        for seed, top1 in enumerate(scores):
            row = dict.fromkeys(accuracy.COLUMNS, "") | {
                "preset": "cpu", "set": "digits", "method": method, "seed": seed, "split": "val", "epochs": 10,
                "top1": top1, "top5": 50.0, "nll": 3.0, "ece": 0.05, "best_top1": top1 + 1, "best_epoch": 9,
                "train_seconds": 100.0, "extra_parameters": 1200, "images": 6000,
                "pixels": 32, "model": "m", "hardware": "h", "versions": '{"torch": "2"}', "commit": "c",
            }  # fmt: skip
            accuracy.append(place, row)
    return place


def test_intervals_are_student_s():
    values = [1.0, 2.0, 4.0, 4.5]
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert table.interval(values) == pytest.approx((high - low) / 2)
    assert math.isnan(table.interval([1.0]))


def test_the_table_pairs_by_seed_and_marks_the_best_epoch(path):
    rows = accuracy.read(path)
    lines = table.table(table.summaries(rows), {"sfr": 1.3}).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["sfr", "ls", "ce"]
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert len(cells) == len(table.HEAD)
    to_ce, to_ls = (table.interval(gains) for gains in ([2.5, 1.5, 3.5], [1.5, 1.0, 1.5]))
    assert cells[1:4] == ["3", "22.33 (sd 1.04)", "19.75 to 24.92"]
    assert cells[4:6] == [f"+2.50 ± {to_ce:.2f}", f"+1.33 ± {to_ls:.2f}"]
    assert cells[6:] == ["(23.33)", "50.00", "3.000", "5.0 %", "1.30", "1,200"]
    assert [line.split("|")[-3].strip() for line in lines[3:]] == ["", "1.00"], "ls was not timed, ce is the measure"


def test_a_difference_says_how_many_pairs_it_has(path):
    """Means over other seeds differ by other amounts than the pairs."""
    rows = [row for row in accuracy.read(path) if (row["method"], row["seed"]) not in {("ce", "1"), ("ls", "2")}]
    found = table.summaries(rows)
    ls, ce = (table.find(found, method, 10) for method in ("ls", "ce"))
    assert table.gain(ls, ce) == "+1.00 (1)" and table.gain(table.find(found, "sfr", 10), ls) == "+1.25 (2)"


def test_other_lengths_are_rows_of_their_own_and_a_lone_seed_has_no_interval(path):
    longer = accuracy.read(path)[0] | {"epochs": "13", "top1": "23.0"}
    with path.open("a", newline="") as file:
        csv.DictWriter(file, accuracy.COLUMNS).writerow(longer)
    lines = table.table(table.summaries(accuracy.read(path)), {"ls": 1.1}).splitlines()
    assert lines[2].startswith("| ls, 13 epochs | 1 | 23.00 |  |")
    assert lines[2].split("|")[-3].strip() == "1.43", "1.1 a batch for 13 epochs in place of 10"
    assert sum("ls" in line for line in lines[2:]) == 2


def test_an_overview_pairs_by_seed_and_counts_the_pairs(path):
    rows = accuracy.read(path)
    rows = [row for row in rows if (row["method"], row["seed"]) != ("ce", "1")]
    column = overview.Column("digits", "digits", epochs=10)
    methods = {"ls": "smoothing", "ce": "plain", "byot": "not run"}
    lines = overview.overview(rows, [column], methods).splitlines()
    own, to_ls = table.interval([21.5, 22.0, 23.5]), table.interval([1.5, 1.0, 1.5])
    assert lines[2:] == [
        f"| **SFR** | **22.3 ± {own:.1f}**; 3 |", f"| smoothing | 21.0 (+1.3 ± {to_ls:.1f}; 3) |", "| plain | 19.5 (+3.0; 2) |",
    ]  # fmt: skip


def test_the_document_is_renewed_between_its_markers_alone(path, tmp_path):
    pytest.importorskip("matplotlib")
    document = tmp_path / "results.md"
    document.write_text("Before.\n\n<!-- cpu-digits-val -->\nold\n<!-- end -->\n\nAfter.\n")
    words = ["--csv", str(path), "--document", str(document), "--timing", str(tmp_path / "none.csv")]
    assert table.main(words) == 0
    first, picture = document.read_text(), (tmp_path / "results-cpu-digits-val.svg").read_bytes()
    assert first.startswith("Before.") and first.endswith("After.\n") and "old" not in first and "+1.33" in first
    assert table.main(words) == 0
    assert document.read_text() == first and (tmp_path / "results-cpu-digits-val.svg").read_bytes() == picture


def test_a_table_without_runs_is_said(path, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    document = tmp_path / "results.md"
    document.write_text("<!-- cpu-digits-val -->\n<!-- end -->\n<!-- cpu-gone-val -->\nold\n<!-- end -->\n")
    assert table.main(["--csv", str(path), "--document", str(document), "--timing", str(tmp_path / "none.csv")]) == 0
    said = capsys.readouterr().err
    assert "a table cpu-gone-val that no run is behind" in said and "digits" not in said and "old" in document.read_text()


def test_a_file_that_is_not_there(path, tmp_path, capsys):
    assert table.main(["--csv", str(path) + "x"]) == 2 and "csv: there is no file" in capsys.readouterr().err
    assert table.main(["--csv", str(path), "--document", str(tmp_path / "no.md")]) == 2


def test_all_sittings_of_the_timing_are_named(path):
    times = [{"rounds": rounds, "batches": "16", "set": "s", "ce_images_per_second": rate, "hardware": "h", "threads": "1"}
             for rounds, rate in (("5", "1127"), ("7", "1030"), ("5", "1127"))]  # fmt: skip
    said = table.caption(accuracy.read(path), times)
    assert "the median of 5 or 7 rounds of 16 batches" in said and "1127 or 1030 images/s" in said


def test_a_set_without_timings_takes_those_of_its_network():
    row = dict.fromkeys(timing.COLUMNS, "") | {"preset": "cpu", "set": "tin100-6k"}
    assert table.timings([row], "cpu", "cifar10-2k") == [row] and table.timings([row], "gpu", "tin100-r18") == []
    own = row | {"set": "cifar10-2k"}
    assert table.timings([row, own], "cpu", "cifar10-2k") == [own]
    assert table.timings([row], "regimes", "tin100-3k-wide") == table.timings([row], "cpu", "digits") == []


def test_times_are_ratios_to_the_runs_of_ce_around_them():
    found = timing.ratios({"sfr": [1.1, 3.0, 1.3]}, {"sfr": [1.0, 2.0, 1.0]})
    assert found["sfr"] == pytest.approx((1.3, 1.2, 1.4))
    assert timing.ratios({"sfr": [1.1]}, {"sfr": [1.0]})["sfr"] == pytest.approx((1.1, 1.1, 1.1))


def test_newer_times_take_the_place_of_older_ones(tmp_path):
    path = tmp_path / "results" / "timing.csv"
    row = dict.fromkeys(timing.COLUMNS, "") | {"preset": "cpu", "set": "digits"}
    timing.merge(path, [row | {"method": "sfr", "ratio": "1.2"}, row | {"method": "dlb", "ratio": "2"}])
    timing.merge(path, [row | {"method": "sfr", "ratio": "1.1"}])
    assert {one["method"]: one["ratio"] for one in accuracy.read(path)} == {"sfr": "1.1", "dlb": "2"}
