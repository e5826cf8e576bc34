"""Charts: no line hides another, and legends name each series by its own symbol."""

from __future__ import annotations

import re

import pytest

from vltprune.viz import charts

ACROSS, UP = charts.layer_axis(2), charts.Axis(0, 10, {0: "0"})


def drawn(*lines):
    return charts.chart(lines, ACROSS, UP, "it")


def line(color, *heights, mark="circle"):
    return charts.Line(list(enumerate(heights)), color, mark=mark)


def test_lines_that_coincide_are_all_seen():
    svg = drawn(line("red", 9, 5, 2), line("blue", 9, 5, 2), line("green", 9, 5, 2), line("black", 9, 5, 3))
    dashed = dict(re.findall(r'stroke="(red|blue|green|black)" stroke-width="2.5"( stroke-dasharray="[^"]*")?', svg))
    assert [bool(dashed[color]) for color in ("red", "blue", "green", "black")] == [False, True, True, False]
    centers = {
        color: re.findall(rf'<circle cx="([^"]*)"[^>]*fill="{color}"', svg) for color in ("red", "blue", "green")
    }
    assert len({*centers["red"], *centers["blue"], *centers["green"]}) == 9


@pytest.mark.parametrize("mark", ["circle", "square", "triangle", "diamond"])
def test_a_mark_at_each_point(mark):
    svg = drawn(charts.Line([(0, 1), (1, 2), (2, float("nan"))], "red", mark=mark))
    assert len(re.findall('<(circle|polygon)[^>]*fill="red"', svg)) == 2


def test_a_single_point_is_seen_without_marks():
    assert 'fill="red"' in drawn(charts.Line([(0, 1)], "red", mark=None))
    assert 'fill="red"' not in drawn(charts.Line([(0, 1), (1, 2)], "red", mark=None))


def test_series_differ_in_color_and_neighbors_in_mark():
    assert len({charts.series_color(i) for i in range(7)}) == 7
    assert all(charts.series_mark(i) != charts.series_mark(i + 1) for i in range(6))
    legend = charts.legend(["a", "<b>"])
    assert legend.count("<svg") == 2 and "&lt;b&gt;" in legend
