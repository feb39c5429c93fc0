"""What the README says was measured is what the demo measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REGIMES = {
    "30 % wrong labels, constant rate": "30% wrong labels, constant rate",
    "clean labels, constant rate": "clean labels, constant rate",
    "30 % wrong labels, rate annealed to zero": "30% wrong labels, annealed rate",
}


def quoted(page: str) -> list[tuple[str, str, str, str]]:
    """The (regime, weights, model, cell) of every number in the README's table."""
    found, regime = [], None
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].strip("*") in REGIMES:
            regime = REGIMES[cells[0].strip("*")]
        elif line.startswith("|") and regime:
            name = re.sub(r", (the default|a short horizon)$", "", cells[0])
            name = name.replace("`", "").replace(" statistics", "")
            numbers = zip(("CNN", "CNN + BatchNorm"), cells[1:], strict=True)
            found += [(regime, name, model, cell) for model, cell in numbers if cell]
        elif regime:
            break
    return found


def measured() -> dict[tuple[str, str, str], str]:
    rows = json.loads((ROOT / "docs" / "digits.json").read_text())["table"]
    cells = {}
    for row in rows:
        cell = f"{row['mean']:.1f} ± {row['std']:.1f}"
        if row["weights"] != "raw weights":
            cell += f", {row['better_than_raw']} of {row['seeds']}"
        cells[row["regime"], row["weights"], row["model"]] = cell
    return cells


def test_the_readme_quotes_what_was_measured() -> None:
    cells = measured()
    numbers = quoted((ROOT / "README.md").read_text())
    assert len(numbers) == 21
    for regime, name, model, cell in numbers:
        assert cells[regime, name, model] == cell


def prose(page: str) -> set[str]:
    """The percentages that the text around the table quotes."""
    text = "\n".join(line for line in page.splitlines() if not line.startswith("|"))
    return set(re.findall(r"\b\d\d\.\d\b", text))


def test_the_prose_quotes_what_was_measured() -> None:
    means = {cell.partition(" ")[0] for cell in measured().values()}
    found = prose((ROOT / "README.md").read_text())
    assert len(found) >= 3
    assert found <= means
    assert not prose("on 94.3 % of the images") <= means - {"94.3"}


def test_a_wrong_number_would_be_found() -> None:
    page = (ROOT / "README.md").read_text().replace("94.2 ± 0.4", "95.2 ± 0.4")
    cells = measured()
    with pytest.raises(AssertionError):
        assert all(cells[r, n, m] == cell for r, n, m, cell in quoted(page))


def test_the_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []
