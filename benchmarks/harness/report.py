"""THE REPORT: tables of what was measured, as values; nothing here measures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.jobs import MALLOC
from harness.peers import CANDIDATES
from harness.sections import DTYPES, LARGE, Row
from harness.shapes import MODELS

Results = dict[str, Any]
FAMILIES = ["ours", "engine", "limit", "peer"]
FEW, MANY = 10, 1000  # numbers of tensors whose times give the overhead


@dataclass(frozen=True)
class Table:
    """A table: the first column is text, the others are numbers or text as well."""

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str = ""
    numbers: bool = True


def tables(results: Results) -> list[Table]:
    """Return every table that the rows are enough for."""
    rows = results["rows"]
    found = []
    cases = [(malloc, threads) for threads in (1, 2) for malloc in MALLOC]
    for malloc, threads in cases:
        found.append(overview(rows, malloc, threads))
    for malloc, threads in cases:
        found += [share_of_limit(rows, dtype, malloc, threads) for dtype in DTYPES]
    found.append(overhead(rows))
    found += [size(rows, dtype) for dtype in DTYPES]
    found.append(step(rows))
    found += [swap(rows, model) for model in MODELS]
    found += [memory(rows, dtype) for dtype in DTYPES]
    found += [contenders(results), machine(results)]
    return [table for table in found if table.lines]


def markdown(results: Results) -> str:
    """Return all tables as a part of a page."""
    parts = []
    if results["quick"]:
        parts.append("A quick run, which says that all is well and not how fast it is.\n")
    for table in tables(results):
        numbers = ["---:" if table.numbers else "---"] * (len(table.columns) - 1)
        lines = [
            f"**{table.title}**",
            "",
            _line(table.columns),
            _line(["---", *numbers]),
            *map(_line, table.lines),
            "",
        ]
        parts.append("\n".join(lines) + (f"\n{table.note}\n" if table.note else ""))
    for reason in results["skipped"]:
        parts.append(f"Not measured: {reason}.\n")
    return "\n".join(parts)


def overview(rows: Sequence[Row], malloc: str, threads: int) -> Table:
    """Return polyak beside the limit and beside the fastest peer that does the same work."""
    lines = []
    for dtype in DTYPES:
        for model in MODELS.values():
            case = _of(rows, "shapes", malloc=malloc, threads=threads, dtype=dtype, model=model)
            mine = next((row for row in case if row["default"]), None)
            if mine is None:
                continue
            rival = fastest_peer(case)
            lines.append(
                [
                    model,
                    dtype,
                    _ms(mine["limit_seconds"]),
                    _ms(mine["seconds"][0]),
                    _ratio(mine["of_limit"]),
                    rival["contender"] if rival else "",
                    f"{rival['of_limit'][0]:.2f}" if rival else "",
                    _ratio(rival["times_ours"]) if rival else "",
                ]
            )
    return Table(
        f"One update, {_threads(threads)}, {_malloc(malloc)}",
        [
            *("tensors of", "weights", "limit, ms", "`EMA.update()`, ms", "of the limit"),
            *("fastest peer", "of the limit", "its time / ours"),
        ],
        lines,
        "Averages are float32. Ratios are medians within rounds, with quartiles.",
    )


def summary(results: Results) -> str:
    """Return the table of the README: one thread, beside the fastest peer of the same work."""
    columns = ["tensors of"]
    for dtype in DTYPES:
        columns += [f"{dtype} weights: of the limit", "the fastest peer takes"]
    lines = [_line(columns), _line(["---", *["---:"] * (len(columns) - 1)])]
    for model in MODELS.values():
        cells = [model]
        for dtype in DTYPES:
            case = _of(
                results["rows"], "shapes", malloc="keep", threads=1, dtype=dtype, model=model
            )
            mine = next((row for row in case if row["default"]), None)
            rival = fastest_peer(case)
            if mine is not None and rival is not None:
                cells.append(f"{100 * mine['of_limit'][0]:.0f} %")
                cells.append(f"{rival['times_ours'][0]:.2f} times as long ({rival['contender']})")
        if len(cells) > 1:
            lines.append(_line(cells))
    return "\n".join(lines)


def fastest_peer(case: Iterable[Row]) -> Row | None:
    """Return the row of the fastest peer that computes the definition, if there is any."""
    same_work = (row for row in case if row["family"] == "peer" and not row["differs"])
    return min(same_work, key=lambda row: row["times_ours"][0], default=None)


def share_of_limit(rows: Sequence[Row], dtype: str, malloc: str, threads: int) -> Table:
    """Return the share of the limit that each contender reaches."""
    case = _of(rows, "shapes", malloc=malloc, threads=threads, dtype=dtype)
    models = [m for m in MODELS.values() if any(row["model"] == m for row in case)]
    lines = []
    for name in _names(case):
        mine = {row["model"]: row for row in case if row["contender"] == name}
        star = "*" if any(row["differs"] for row in mine.values()) else ""
        cells = [f"{mine[m]['of_limit'][0]:.2f}" if m in mine else "" for m in models]
        lines.append([name + star, *cells])
    marked = any(line[0].endswith("*") for line in lines)
    return Table(
        f"Share of the limit, {_dtypes(dtype)}, {_threads(threads)}, {_malloc(malloc)}",
        ["", *models],
        lines,
        "\\* computes something else, as said below: not the same work." if marked else "",
    )


def overhead(rows: Sequence[Row]) -> Table:
    """Return what an update costs besides moving bytes."""
    case = [row for row in _of(rows, "tensors") if row["family"] != "limit"]
    counts = sorted({row["tensors"] for row in case})
    lines = []
    for name in _names(case):
        taken = {row["tensors"]: row["seconds"][0] for row in case if row["contender"] == name}
        each = (taken[MANY] - taken[FEW]) / (MANY - FEW)
        fixed = taken[FEW] - FEW * each
        totals = [_ms(taken[count]) for count in counts]
        lines.append([name, f"{1e6 * fixed:.1f}", f"{1e6 * each:.2f}", *totals])
    return Table(
        "Overhead: tensors of one element, float32, one thread",
        ["", "fixed, us", "us per tensor", *(f"{count:,} tensors, ms" for count in counts)],
        lines,
        f"Fixed and per tensor are those of the line through {FEW} and {MANY:,} tensors.",
    )


def size(rows: Sequence[Row], dtype: str) -> Table:
    """Return the time of an update of one tensor, by its size."""
    case = _of(rows, "size", dtype=dtype)
    counts = sorted({row["elements"] for row in case})
    lines = []
    for name in _names(case):
        mine = {row["elements"]: row for row in case if row["contender"] == name}
        cells = [
            f"{_ms(mine[n]['seconds'][0])} ({mine[n]['of_limit'][0]:.2f})" if n in mine else ""
            for n in counts
        ]
        star = "*" if any(row["differs"] for row in mine.values()) else ""
        lines.append([name + star, *cells])
    return Table(
        f"One tensor, {_dtypes(dtype)}, one thread: ms (share of the limit)",
        ["", *(f"{count // 10**6:,} M" for count in counts)],
        lines,
        "Of a billion elements malloc returns pages, and peers with temporary copies have no room."
        if any(count >= LARGE for count in counts)
        else "",
    )


def step(rows: Sequence[Row]) -> Table:
    """Return the share of a training step that an update takes."""
    case = _of(rows, "step")
    models = list(dict.fromkeys(row["model"] for row in case))
    lines = []
    for name in _names(case):
        mine = {row["model"]: row for row in case if row["contender"] == name}
        cells = []
        for model in models:
            low, high = (100 * value for value in mine[model]["of_step"][1:])
            cells += [
                _ms(mine[model]["seconds"][0]),
                f"{100 * mine[model]['of_step'][0]:.1f} % ({low:.1f} to {high:.1f})",
            ]
        lines.append([name, *cells])
    steps = {row["model"]: row for row in case}
    said = [
        f"{model}, {steps[model]['parameters'] / 1e6:.1f} M parameters: a step takes "
        f"{_ms(steps[model]['step_seconds'])} ms"
        for model in models
    ]
    return Table(
        "Share of a training step: forward, backward, AdamW; float32, one thread",
        ["", *(text for model in models for text in (f"{model}: update, ms", "of the step"))],
        lines,
        ". ".join(said) + "." if said else "",
    )


def swap(rows: Sequence[Row], model: str) -> Table:
    """Return what it takes to let a model hold its averages and its weights again."""
    case = _of(rows, "swap", model=model)
    mallocs = [m for m in MALLOC if any(row["malloc"] == m for row in case)]
    lines = []
    for name in _names(case):
        mine = {row["malloc"]: row for row in case if row["contender"] == name}
        cells = [
            text
            for m in mallocs
            for text in (_ms(mine[m]["seconds"][0]), _ratio(mine[m]["times_ours"]))
        ]
        lines.append([name, *cells])
    return Table(
        f"`applied()` in and out, store, copy and restore: {MODELS[model]}, float32, one thread",
        ["", *(text for m in mallocs for text in (f"ms, {_malloc(m)}", "time / ours"))],
        lines,
        "Who is not here evaluates a second module." if case else "",
    )


def memory(rows: Sequence[Row], dtype: str) -> Table:
    """Return the tensor memory of each contender beside the model's."""
    lines = [
        [
            row["contender"],
            _mb(row["held"]),
            f"{row['held'] / row['weights']:.2f}",
            _mb(row["update"]),
            "" if row["swap"] is None else _mb(row["swap"]),
        ]
        for row in _of(rows, "memory", dtype=dtype)
    ]
    weights = [row["weights"] for row in _of(rows, "memory", dtype=dtype)]
    return Table(
        f"Tensor memory beside the model, {_dtypes(dtype)}",
        ["", "held, MB", "of the weights", "more in an update, MB", "more in a swap, MB"],
        lines,
        f"The weights of {_largest(_of(rows, 'memory'))} are {_mb(weights[0])} MB."
        if weights
        else "",
    )


def contenders(results: Results) -> Table:
    """Return who takes part, and with which settings."""
    present = {row.get("contender") for row in results["rows"]}
    lines = [
        [
            peer.name,
            results["versions"][peer.package],
            peer.settings,
            peer.mixed,
            peer.differs,
        ]
        for peer in CANDIDATES
        if peer.name in present
    ]
    return Table(
        "The peers and their settings",
        ["", "release", "settings", "and for bfloat16 weights", "which then"],
        lines,
        numbers=False,
    )


def machine(results: Results) -> Table:
    """Return what it was measured on."""
    facts = results["machine"]
    lines = [
        ["processor", f"{facts['cpu']}, {facts['cores']} cores, {facts['instructions']}"],
        ["caches", ", ".join(f"{level} {size}" for level, size in facts["caches"].items())],
        ["memory", f"{facts['memory_bytes'] / 1e9:.0f} GB, huge pages: {facts['huge_pages']}"],
        ["system", facts["system"]],
        ["limit", f"{facts['compiler']}, {facts['compiler_flags']}"],
        ["versions", ", ".join(f"{name} {number}" for name, number in results["versions"].items())],
        ["command", f"`{results['command']}`, {results['seconds'] / 60:.0f} minutes"],
        ["load average", "{:.1f} before, {:.1f} after".format(*results["load"])],
    ]
    for row in _of(results["rows"], "allocator"):
        took = f"64 MB taken, written and given back in {_ms(row['seconds'][0])} ms"
        lines.append([_malloc(row["malloc"]), took])
    return Table("The machine", ["", ""], lines, numbers=False)


def _of(rows: Sequence[Row], section: str, **case: Any) -> list[Row]:
    return [
        row
        for row in rows
        if row["section"] == section and all(row[key] == value for key, value in case.items())
    ]


def _names(rows: Iterable[Row]) -> list[str]:
    """Return the contenders: ours first, then the limit, then the peers."""
    families = {row["contender"]: row["family"] for row in rows}
    return sorted(families, key=lambda name: FAMILIES.index(families[name]))


def _largest(rows: Sequence[Row]) -> str:
    return MODELS[rows[0]["model"]] if rows else ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ratio(values: Sequence[float]) -> str:
    """Return a ratio with its quartiles.

    >>> _ratio([1.374, 1.351, 1.41])
    '1.37 (1.35 to 1.41)'
    """
    median, low, high = values
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def _ms(seconds: float) -> str:
    """Return milliseconds in three digits.

    >>> _ms(0.0000123), _ms(0.0123), _ms(1.2345)
    ('0.0123', '12.3', '1,230')
    """
    return f"{float(f'{1e3 * seconds:.3g}'):,.10g}"


def _mb(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def _dtypes(dtype: str) -> str:
    return f"{dtype} into float32"


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def _malloc(name: str) -> str:
    return {"keep": "malloc keeps pages", "return": "malloc returns pages"}[name]
