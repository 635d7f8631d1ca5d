"""The outcome of a comparison as a table for the terminal and as one HTML file with charts. Nothing is trained here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.markup import escape as escape_markup
from rich.table import Table

from mach.compare import charts, page
from mach.compare.rows import Facts, Row, percent, plain, scaled, this_machine, three
from mach.errors import ConfigError
from mach.files import atomic

__all__ = ["Facts", "Row", "render_html", "render_parts", "render_table", "this_machine", "write_report"]


BEST = ' class="best"'


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    value: Callable[[Row], float | None]
    text: Callable[[Row], str]
    high_is_good: bool = False
    against_full: bool = False  # give the ratio to the full head too


COSTS = (
    _Column("train", lambda row: row.train_s, lambda row: plain(row.train_s, "s")),
    _Column("parameters", lambda row: row.parameters, lambda row: scaled(row.parameters), against_full=True),
    _Column("on disk", lambda row: row.bytes, lambda row: scaled(row.bytes, "B")),
    _Column("a query", lambda row: row.predict_ms, lambda row: plain(row.predict_ms, "ms")),
    _Column("peak memory", lambda row: row.peak_bytes, lambda row: scaled(row.peak_bytes, "B")),
    _Column("predicted", lambda row: row.predicted_bytes or None, lambda row: scaled(row.predicted_bytes, "B")),
)


@dataclass(frozen=True, slots=True)
class _Cell:
    text: str
    ratio: str  # "0.21x" of the full head's, or nothing
    is_best: bool


def _metric_column(key: str) -> _Column:
    return _Column(key, lambda row: row.metrics.get(key), lambda row: percent(row.metrics.get(key)), high_is_good=True)


def _part_column(name: str) -> _Column:
    return _Column(name, lambda row: row.time_by_part.get(name), lambda row: plain(row.time_by_part[name], "s"))


def _columns(rows: Sequence[Row]) -> list[_Column]:
    return [*map(_metric_column, charts.precision_keys(rows)), *COSTS]


def _cells(rows: Sequence[Row], column: _Column) -> list[_Cell]:
    """Give a column's cells, a row each; the best are those that read like the best one."""
    known = [(value, column.text(row)) for row in rows if (value := column.value(row)) is not None]
    best = (max if column.high_is_good else min)(known, default=(0.0, ""))[1]
    full = next((row for row in rows if row.is_full), None)
    base = column.value(full) if full and column.against_full else None
    texts = {text for _, text in known}  # where all read alike none is best
    cells = []
    for row in rows:
        value = column.value(row)
        text = column.text(row) if value is not None else "-"
        ratio = f"{three(value / base)}x" if base and value is not None and not row.is_full else ""
        cells.append(_Cell(text, ratio, is_best=text == best and len(texts) > 1))
    return cells


def _check(rows: Sequence[Row]) -> None:
    if not rows:
        raise ConfigError("there is no configuration to report: give one or more")
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise ConfigError(f"the configurations of a report must have different names, got {', '.join(names)}")
    if not charts.precision_keys(rows):
        raise ConfigError("no configuration has a P@k to report: evaluate with k = 1, 3, 5")


def render_table(rows: Sequence[Row]) -> Table:
    """Give the terminal's table: P@k in percent, costs, ratios to the full head if there is one, the best in bold.

    Raises: ConfigError without rows, or if two share a name, or if none has a P@k.
    """
    _check(rows)
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column("configuration", no_wrap=True)
    columns = _columns(rows)
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    cells = [_cells(rows, column) for column in columns]
    for i, row in enumerate(rows):
        texts = [_marked_up(column[i]) for column in cells]
        table.add_row(escape_markup(row.name), *texts)
    return table


def render_parts(rows: Sequence[Row]) -> Table | None:
    """Give the terminal's table of where the time of training went, in percent; None if it was not measured."""
    names = charts.part_names(rows)
    if not names:
        return None
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column("training, % of the time", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        total = sum(row.time_by_part.values())
        shares = [f"{100 * row.time_by_part.get(name, 0.0) / total:.1f}" if total else "-" for name in names]
        table.add_row(escape_markup(row.name), *shares)
    return table


def _marked_up(cell: _Cell) -> str:
    text = f"[bold]{cell.text}[/bold]" if cell.is_best else cell.text
    return f"{text} [dim]{cell.ratio}[/dim]" if cell.ratio else text


def render_html(rows: Sequence[Row], facts: Facts, machine: Mapping[str, str]) -> str:
    """Give the report as one HTML page that loads nothing: table, charts, every metric, settings, machine and versions.

    Raises: ConfigError as `render_table`.
    """
    _check(rows)
    settings, shared = _settings(rows)
    return page.PAGE.substitute(
        title=escape(f"{facts.name}: {_count(len(rows), 'configuration')} compared"),
        style=page.STYLE,
        facts=escape(
            f"{facts.n_train:,} training and {facts.n_test:,} test samples, {facts.n_features:,} features, "
            f"{facts.n_labels:,} labels, {facts.labels_a_point:.2f} labels a sample"
        ),
        lead=escape(_lead(rows)),
        table=_html_table(rows),
        note=escape(_note(rows)),
        figures="".join(_figures(rows)),
        metrics=_transposed(rows, [(key, _cells(rows, _metric_column(key))) for key in _metric_keys(rows)]),
        settings=settings,
        shared=escape(shared),
        machine=" &middot; ".join(f"{escape(name)} {escape(value)}" for name, value in machine.items()),
    )


def write_report(path: str | Path, rows: Sequence[Row], facts: Facts, machine: Mapping[str, str] | None = None) -> None:
    """Write `render_html` to a file, whole or not at all; `machine` is the one at hand unless given.

    Raises: ConfigError as `render_table`; OSError if the file cannot be written.
    """
    text = render_html(rows, facts, this_machine() if machine is None else machine)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _lead(rows: Sequence[Row]) -> str:
    """Say in a sentence or two which row is best by the first P@k, and how the best ensemble stands to the full head."""
    key = charts.precision_keys(rows)[0]
    best_first = sorted((row for row in rows if key in row.metrics), key=lambda row: -row.metrics[key])
    best, full = best_first[0], next((row for row in best_first if row.is_full), None)
    hashed = next((row for row in best_first if not row.is_full), None)
    text = f"Best {key}: {best.name} with {percent(best.metrics[key])} %"
    if not (full and hashed):
        return text + "."
    points = 100 * (hashed.metrics[key] - full.metrics[key])
    text += ", " if hashed is best else f". The best ensemble, {hashed.name}, stands "
    text += f"{abs(points):.2f} points {'above' if points >= 0 else 'below'} {full.name if hashed is best else 'it'}"
    if full.parameters and full.train_s:
        sizes, times = hashed.parameters / full.parameters, hashed.train_s / full.train_s
        text += f", with {three(sizes)} times its parameters and {three(times)} times its training time"
    return text + "."


def _note(rows: Sequence[Row]) -> str:
    text = "P@k in percent. A query is the time from features to top-k, per test sample. Peak memory is the training process's."
    full = next((row for row in rows if row.is_full), None)
    return f"{text} Small figures are ratios to {full.name}." if full and len(rows) > 1 else text


def _figures(rows: Sequence[Row]) -> Iterable[str]:
    yield page.FIGURE.substitute(
        title="Precision",
        caption="Share of the first k labels that are true. The axes are cut to the range of the values.",
        chart=charts.precision_chart(rows),
    )
    yield page.FIGURE.substitute(
        title="Cost", caption="Less is better; bars begin at 0, the least is bold.", chart=charts.cost_chart(rows)
    )
    parts = charts.parts_chart(rows)
    if parts:
        yield page.FIGURE.substitute(
            title="Time by part",
            caption="Seconds of training: the encoder, there and back; the head's outputs, and their gradients; what follows "
            "from these; the update of dense weights; what comes between steps. The shortest is bold.",
            chart=parts + _parts_table(rows),
        )
    curves = charts.repetitions_chart(rows)
    if curves:
        yield page.FIGURE.substitute(
            title="Repetitions",
            caption="Precision when only the first repetitions of a model are decoded. Dashed: the full head.",
            chart=curves,
        )


def _html_table(rows: Sequence[Row]) -> str:
    columns = _columns(rows)
    cells = [_cells(rows, column) for column in columns]
    body = [
        _line(_name(row, colour), [column[i] for column in cells])
        for i, (row, colour) in enumerate(zip(rows, charts.colours(rows), strict=True))
    ]
    return _table([column.title for column in columns], body)


def _parts_table(rows: Sequence[Row]) -> str:
    return _transposed(rows, [(name, _cells(rows, _part_column(name))) for name in charts.part_names(rows)])


def _transposed(rows: Sequence[Row], lines: Iterable[tuple[str, Sequence[_Cell]]]) -> str:
    return _table([row.name for row in rows], [_line(escape(title), cells) for title, cells in lines])


def _table(titles: Iterable[str], lines: Iterable[str]) -> str:
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _line(head: str, cells: Iterable[_Cell]) -> str:
    data = []
    for cell in cells:
        ratio = f"<small>{cell.ratio}</small>" if cell.ratio else ""
        data.append(f"<td{BEST if cell.is_best else ''}>{escape(cell.text)}{ratio}</td>")
    return f'<tr><th scope="row">{head}</th>{"".join(data)}</tr>'


def _name(row: Row, colour: str) -> str:
    return f'<span class="swatch" style="background: {charts.COLOURS[colour]}"></span>{escape(row.name)}'


def _metric_keys(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.metrics))


def _settings(rows: Sequence[Row]) -> tuple[str, str]:
    """Give a table of the settings in which rows differ, and a line of those they share."""
    keys = dict.fromkeys(key for row in rows for key in row.config)
    values: dict[str, list[Any]] = {key: [row.config.get(key, "-") for row in rows] for key in keys}
    differing = [key for key, each in values.items() if any(value != each[0] for value in each)]
    lines = [(key, [_Cell(str(value), "", is_best=False) for value in values[key]]) for key in differing]
    table = _transposed(rows, lines) if lines else ""
    return table, ", ".join(f"{key} {values[key][0]}" for key in keys if key not in differing) or "nothing"
