"""Figures are read off the samples as they are told, and a goal is met or missed as its bound says."""

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import goals, graph, harness, plots, report, sections, starts
from benchmarks.harness import Absent, Case, Group, Section

WHOLE = "whole process"


def _group(title: str, **samples: list[float]) -> Group:
    return Group(title, 3, {case: [{WHOLE: value} for value in values] for case, values in samples.items()})


def test_a_ratio_is_taken_round_by_round() -> None:
    group = _group("drift", ours=[1, 10, 100], theirs=[2, 20, 400])
    assert group.ratio("ours", "theirs", WHOLE) == 0.5
    assert group.ratio("ours", "nobody", WHOLE) is None


@pytest.mark.parametrize(
    ("least", "found", "outcome"),
    [(False, 1.0, "met"), (False, 1.1, "**missed**"), (True, 0.9, "**missed**"), (True, None, "not measured")],
)
def test_a_goal_is_met_or_missed_as_its_bound_says(*, least: bool, found: float | None, outcome: str) -> None:
    assert goals.Goal("faster", 1.0, lambda _groups: found, least=least).row([]).outcome == outcome


def test_every_goal_reads_samples_of_the_names_that_are_measured() -> None:
    cases = {starts.SUPERVISOR: [1.0], "bwrap": [2.0]}
    both: dict[str, list[harness.Sample]] = {
        case: [{"to first instruction": value, WHOLE: value} for value in rows] for case, rows in cases.items()
    }
    assert goals.GOALS[0].row([Group("starts", 1, both)]).measured == 0.5
    grown = [_group(f"graph of {size} tenants", **{graph.NOOP: [size / 1000]}) for size in (100, 1000, 5000)]
    (growth,) = (goal for goal in goals.GOALS if goal.text.startswith("growth"))
    assert growth.row(grown).measured == pytest.approx(1)
    assert len({goal.text for goal in goals.GOALS}) == len(goals.GOALS)
    assert report.text({}).count("not measured") == len(goals.GOALS)


def test_what_is_saved_is_loaded_again_and_anything_else_is_nothing(tmp_path: Path) -> None:
    group = _group("g", ours=[1, 2])
    group.absent.append(Absent("peer", "it said | no"))
    known = {"s": Section("s", [group], [{"row": "r", "ms": 1.5}], {"kernel": "6"}, 2.5, "OSError: gone")}
    harness.save(tmp_path / "result.json", known)
    assert harness.load(tmp_path / "result.json") == known
    assert "it said / no" in report.text(known)
    assert "OSError: gone" in report.text(known)
    (tmp_path / "result.json").write_text('{"machine": {}}')
    assert harness.load(tmp_path / "result.json") == {}


def test_a_case_that_fails_is_absent_with_what_it_said_and_the_others_are_measured() -> None:
    def fails() -> harness.Sample:
        raise ValueError("no such thing")

    works: Callable[[], harness.Sample] = lambda: {WHOLE: 1.0}  # noqa: E731 - a case's function
    group = harness.measure("t", [Case("bad", fails), Case("good", works)], rounds=2)
    assert group.absent == [Absent("bad", "no such thing")]
    assert group.values("good", WHOLE) == [1.0, 1.0]


def test_a_plot_has_a_bar_a_case_and_is_well_formed() -> None:
    found = plots.bars(_group("a <b>", ours=[1, 2, 3], theirs=[2, 4, 6]))
    tree = ElementTree.fromstring(found)
    assert sum(element.tag.endswith("rect") for element in tree) == 3  # the background too


def test_only_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"before\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nafter\n")
    report.between(file, "new")
    assert file.read_text() == f"before\n{report.MARKS[0]}\n\nnew\n\n{report.MARKS[1]}\nafter\n"
    for readme in (report.README, report.TOP):
        assert all(readme.read_text().count(mark) == 1 for mark in report.MARKS)
    assert set(sections.ALL) >= {"starts", "graph", "network"}
