"""The benchmarks of speed: that they measure what they say, on the smallest sizes, and fill their page."""

import pytest
import torch

from benchmarks import loops, pages, solvers, speed, steps
from benchmarks.accuracy import read
from benchmarks.features import random_costs
from benchmarks.libraries import LOOP, OURS, assignment_loop, candidates, emd_loop, log_domain, ours
from benchmarks.measured import Row, ratio_row
from timm_sfr.method.sinkhorn import uniform_marginals


def test_a_place_in_a_page_is_filled_again_and_made_where_missing():
    text = "before\n\n<!-- a -->\nold\n<!-- end -->\n\nafter\n"
    text = pages.fill(pages.fill(text, "a", "new\n"), "b", "more")
    assert "old" not in text and text.startswith("before\n\n<!-- a -->\nnew\n<!-- end -->\n\nafter\n")
    assert pages.labels(text) == {"a", "b"} and pages.fill(text, "b", "more") == text


def test_a_ratio_is_of_the_second_to_the_first_and_speed_the_other_way_round():
    def work(count):
        x = torch.rand(400, 400)
        return lambda: [x @ x for _ in range(count)]

    slow = ratio_row("part", "what", work(4), work(40), 3)
    assert 4 < slow.value < 25 and slow.low <= slow.value <= slow.high
    assert 1 / 25 < ratio_row("part", "what", work(4), work(40), 3, speed=True).value < 1 / 4


@pytest.mark.slow
def test_steps_are_measured_written_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "CPU", (steps.Setting("resnet20_cifar", 32, 4, target=1e-9),))
    threads = torch.get_num_threads()
    path, page = tmp_path / "speed.csv", tmp_path / "page.md"
    page.write_text("# Page\n")
    words = ["--rounds", "2", "--seconds", "0.01", "--threads", str(threads), "--csv", str(path), "--document", str(page)]
    assert speed.main([*words, "--parts", "step", "profile"]) == 0
    assert speed.main([*words, "--parts", "graph"]) == 0
    rows = read(path)
    assert {row["part"] for row in rows} == {"step", "profile", "graph"}
    step, base = [row for row in rows if row["part"] == "step"]
    assert float(step["value"]) > 0 and base["what"].startswith("plain over plain")
    assert [row["value"] for row in rows if row["part"] == "graph"] == ["0"]
    text = page.read_text()
    assert "at most 1e-09: **missed**" in text and "at most 0: met" in text and "| aten::" in text
    added = steps.profile_rows(steps.CPU[0], torch.device("cpu"), count=1000, steps=1)
    assert next(row.low for row in added if row.what.startswith("aten::bmm")) > 0, "transport is an operation that SFR adds"
    assert speed.main([*words, "--models", "resnet19"]) == 2
    path.write_text("a,b\n1,2\n")
    assert speed.main([*words, "--parts", "graph"]) == 2
    assert "to be of this benchmark" in capsys.readouterr().err


@pytest.mark.slow
def test_peak_memory_is_of_the_step_alone():
    assert 200 < steps.peak(steps.Setting("resnet20_cifar", 32, 2), True, "cpu") < 3000


def test_the_loader_is_measured_with_and_without_a_cache(monkeypatch):
    monkeypatch.setattr(loops, "AUGMENTATIONS", {"none": loops.AugConfig(no_aug=True)})
    with loops.small_images(None, per_class=13) as folder:
        rows = loops.loader_rows(folder, 1)
    assert [row.what.split(", ", 1)[1] for row in rows] == [
        "training, none, 0 workers", "training, none, 2 workers", "validation, 0 workers", "validation, 2 workers"
    ]  # fmt: skip
    assert rows[0].value > 1, "images that are decoded once must come faster"


def test_solvers_agree_on_the_optimum():
    cost = random_costs(8, 16)
    best = {"": solvers.optimum(cost)}
    for solve, limit in ((emd_loop, 1e-3), (assignment_loop, 1e-3), (ours, 1.0)):
        gap = solvers.gaps(solve, {"": cost}, best)
        assert gap.shape == (8,) and gap.max() <= limit and gap.min() >= -1e-3
    # The gap is of a plan with the right marginals: the libraries' own may miss them.
    assert solvers.gaps(lambda cost: log_domain(cost, 2), {"": cost}, best).min() >= -1e-3
    a, b = uniform_marginals(cost)
    assert torch.allclose(ours(cost).sum(2), a, atol=1e-6) and torch.allclose(ours(cost).sum(1), b, atol=1e-6)


def test_solvers_are_compared_written_and_shown(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    chosen = {OURS: candidates()[OURS], LOOP: candidates()[LOOP]}
    monkeypatch.setattr(solvers, "candidates", lambda: chosen)
    monkeypatch.setattr(solvers, "SWEPT", (16, 16))
    path, page = tmp_path / "solvers.csv", tmp_path / "page.md"
    page.write_text("# Page\n")
    words = ["--batches", "64", "--nodes", "16", "--rounds", "1", "--threads", str(torch.get_num_threads())]
    assert solvers.main([*words, "--csv", str(path), "--document", str(page)]) == 0
    rows = read(path)
    sizes = {row["solver"]: row for row in rows if row["kind"] == "size"}
    assert set(sizes) == {OURS, LOOP} and float(sizes[LOOP]["gap"]) < 1e-3 and float(sizes[LOOP]["ratio"]) > 0
    assert "64 of 16 x 16" in page.read_text() and (tmp_path / "performance-solvers.svg").exists()


def test_of_a_library_the_fastest_setting_within_the_limit_is_taken():
    def row(solver, setting, time, gap):
        return solvers.Row("sweep", "random", 1, 1, solver, setting, time, None, None, None, gap, gap)

    rows = [row(OURS, "x", 1, 0.2), row("a", "slow", 9, 0.1), row("a", "right", 5, 0.9), row("a", "rough", 1, 1.1),
            row("b", "never", 1, float("nan"))]  # fmt: skip
    assert solvers.fastest(rows) == {"a": "right"}


def test_rows_say_what_they_miss():
    row = {"value": "0.97", "target": "0.98", "at_least": "True"}
    assert speed.verdict(row) == "at least 0.98: **missed**" and speed.verdict({**row, "at_least": "False"}).endswith("met")
    assert speed.verdict({**row, "target": "None"}) == "" and Row("p", "w", 1, 1, 1).target is None
