"""The page about teachers quotes what `make ssl` measured, and nothing else."""

from __future__ import annotations

import json
import runpy
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ["pretrain", "classify", "segment", "mean_teacher"]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The functions of examples/ssl/report.py, which is a script."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples" / "ssl"), *sys.path])
    monkeypatch.delitem(sys.modules, "common", raising=False)
    return runpy.run_path(str(ROOT / "examples" / "ssl" / "report.py"))


def test_the_table_of_the_page_is_the_one_that_was_measured(report: dict[str, Any]) -> None:
    rows = json.loads((ROOT / "docs" / "ssl.json").read_text())["rows"]
    found: dict[str, list[Any]] = {stage: [] for stage in STAGES}
    for row in rows:
        found[row["stage"]].append(row)
    assert all(found.values())
    assert all(len(row["values"]) >= 4 for row in rows), "at least four seeds"
    assert (ROOT / "docs" / "ssl-report.md").read_text() == report["markdown"](found)


def test_a_cell_is_mean_and_standard_deviation(report: dict[str, Any]) -> None:
    values = [70.0, 72.0, 77.0]
    rows = [
        {"task": "probe", "method": "teacher", "metric": "accuracy %", "values": values},
        {"task": "k-NN", "method": "student", "metric": "accuracy %", "values": values[:1]},
    ]
    text = report["markdown"]({"classify": rows}).splitlines()
    cell = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    assert text[2:] == [
        "| | probe | k-NN |",
        "|---|---|---|",
        f"| teacher | {cell} |  |",
        "| student |  | 70.0 |",
    ]
