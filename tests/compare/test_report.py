"""The report of a comparison: numbers, marks, escapes, a page that stands alone."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mach.compare import charts
from mach.compare.report import Facts, Row, render_html, render_parts, render_table, this_machine, write_report
from mach.compare.rows import percent, plain, scaled, three
from mach.errors import ConfigError

FACTS = Facts(name="tate", n_train=36_796, n_test=9_202, n_features=11_579, n_labels=14_787, labels_a_point=15.65)
MACHINE = {"CPU": "Some <CPU> 3000, 2 cores", "python": "3.11.7"}

PARTS_S = {"data": 1.0, "forward": 2.0, "backward": 3.0, "rows": 5.0, "head forward": 8.0, "head backward": 16.0, "update": 15.0}


def row(name, p1, *, table="hashed", parameters=2_000_000, train_s=50.0, by_repetitions=(), parts_s=None, **config):
    return Row(
        name=name,
        config={"table": table, "hidden": 512, **config},
        metrics={"P@1": p1, "P@3": p1 - 0.05, "R@10": 0.9},
        train_s=train_s,
        parameters=parameters,
        bytes=4 * parameters,
        predict_s=4.0,
        decode_s=1.0,
        n_test=8_000,
        peak_bytes=812_000_000,
        predicted_bytes=900_000_000,
        parts_s=PARTS_S if parts_s is None else parts_s,
        by_repetitions=by_repetitions,
    )


def three_rows():
    curve = [(r, {"P@1": 0.9412 - 0.02 / r, "P@3": 0.8912 - 0.02 / r}) for r in (1, 2, 4, 8)]
    return [
        row("eight", 0.9412, by_repetitions=curve, repetitions=8),
        row("sixteen", 0.9375, parameters=40_000_000, by_repetitions=curve, repetitions=16),
        row(
            "the full head", 0.9284, table="identity", parameters=8_000_000, train_s=204.9, by_repetitions=[(1, {"P@1": 0.9284})]
        ),
    ]


def terminal(rows, width=140):
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(render_table(rows))
    return capture.get()


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order; keeps what the tests ask for."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts, self.cells = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1] if self.open else None}>"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] == "td":
            self.cells.append((data, self.elements[-1][1].get("class")))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


# The terminal's table


def test_the_table_holds_the_numbers():
    text = terminal(three_rows())
    assert text.splitlines()[0].split() == "configuration P@1 P@3 train parameters on disk a query peak memory predicted".split()
    assert text.splitlines()[1].split() == "eight 94.12 89.12 50.0 s 2.00 M 0.25x 8.00 MB 0.50 ms 812 MB 900 MB".split()
    assert text.splitlines()[3].split() == "the full head 92.84 87.84 205 s 8.00 M 32.0 MB 0.50 ms 812 MB 900 MB".split()


def test_the_best_is_bold_and_a_tie_of_all_is_not():
    columns = {str(column.header): list(column.cells) for column in render_table(three_rows()).columns}
    assert columns["P@1"] == ["[bold]94.12[/bold]", "93.75", "92.84"]
    assert columns["train"] == ["[bold]50.0 s[/bold]", "[bold]50.0 s[/bold]", "205 s"]
    assert columns["a query"] == ["0.50 ms"] * 3
    assert columns["parameters"][0] == "[bold]2.00 M[/bold] [dim]0.25x[/dim]"


def test_without_a_full_head_there_are_no_ratios():
    assert "x" not in terminal([row("one", 0.5), row("two", 0.6)]).replace("configuration", "")


def test_a_name_is_not_markup():
    assert "[red]hot[/red]" in terminal([row("[red]hot[/red]", 0.5)])


def test_a_metric_that_is_missing_is_a_hyphen():
    short = row("short", 0.5)
    long = Row(**{f: getattr(short, f) for f in Row.__dataclass_fields__} | {"name": "long", "metrics": {"P@1": 0.4, "P@5": 0.2}})
    assert terminal([short, long]).splitlines()[1].split()[1:4] == ["50.00", "45.00", "-"]
    Page(render_html([short, long], FACTS, MACHINE))


def test_where_the_time_went_is_a_table_of_shares():
    rows = [row("one", 0.5), row("[red]two", 0.5, parts_s={"communication": 3.0, "update": 1.0}), row("old", 0.5, parts_s={})]
    console = Console(width=140, force_terminal=False)
    with console.capture() as capture:
        console.print(render_parts(rows))
    lines = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert lines == [
        "training, % of the time encoder head forward head backward update communication rest",
        "one 20.0 16.0 32.0 30.0 0.0 2.0",
        "[red]two 0.0 0.0 0.0 25.0 75.0 0.0",
        "old - - - - - -",
    ]
    assert render_parts(rows[2:]) is None
    page = Page(render_html(rows, FACTS, MACHINE))
    assert ("3.00 s", None) in page.cells and ("1.00 s", "best") in page.cells and ("-", None) in page.cells


def test_a_prediction_that_was_not_made_is_a_hyphen():
    fields = {f: getattr(row("one", 0.5), f) for f in Row.__dataclass_fields__}
    assert terminal([Row(**fields | {"predicted_bytes": 0})]).splitlines()[1].split()[-1] == "-"


# The page


def test_the_page_holds_the_numbers():
    page = Page(render_html(three_rows(), FACTS, MACHINE))
    text = "".join(page.texts)
    for number in (
        "94.12",
        "93.75",
        "87.84",
        "90.00",
        "36,796",
        "14,787",
        "15.65 labels a sample",
        "205 s",
        "160 MB",
        "0.25x",
        "5.00x",
    ):
        assert number in text
    assert ("94.12", "best") in page.cells and ("93.75", None) in page.cells
    assert (
        "Best P@1: eight with 94.12 %, 1.28 points above the full head, with 0.25 times its parameters and 0.24 times its" in text
    )


def test_the_lead_names_the_full_head_when_it_wins():
    rows = [row("eight", 0.9), row("the full head", 0.95, table="identity")]
    text = "".join(Page(render_html(rows, FACTS, MACHINE)).texts)
    assert "Best P@1: the full head with 95.00 %. The best ensemble, eight, stands 5.00 points below it, with 1.00 times" in text


def test_the_page_shows_machine_and_settings():
    text = "".join(Page(render_html(three_rows(), FACTS, MACHINE)).texts)
    assert "Some <CPU> 3000, 2 cores" in text and "python 3.11.7" in text
    assert "The same in all" in text and "hidden 512" in text


def test_the_page_loads_nothing():
    html = render_html(three_rows(), FACTS, MACHINE)
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|url\((?!#)|@import|<!ENTITY", html)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object", "image"}
    references = [
        value for _, attributes in page.elements for key, value in attributes.items() if key in ("href", "xlink:href", "src")
    ]
    assert all(value.startswith("#") for value in references)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert {value.removeprefix("#") for value in references} <= set(ids)
    assert len(ids) == len(set(ids))


def test_charts_have_alternative_texts_with_their_numbers():
    charts_of_page = Page(render_html(three_rows(), FACTS, MACHINE)).all("svg")
    assert len(charts_of_page) == 4 and all(chart["role"] == "img" for chart in charts_of_page)
    precision, cost, parts, repetitions = (chart["aria-label"] for chart in charts_of_page)
    assert precision.startswith("P@1: eight 94.12 %, sixteen 93.75 %, the full head 92.84 %; P@3: eight 89.12 %")
    assert "Decoding alone, ms a query: eight 0.12 ms" in cost and "Training, s: eight 50.0 s" in cost
    assert parts.startswith(
        "eight: encoder 10.0 s, head forward 8.00 s, head backward 16.0 s, update 15.0 s, rest 1.00 s; sixteen: "
    )
    assert repetitions.startswith("P@1 of eight by repetitions: 1: 92.12 %, 2: 93.12 %, 4: 93.62 %, 8: 93.87 %; P@1 of sixteen")


def test_names_are_escaped_everywhere():
    nasty = "<script>alert('1')</script> & \"q\" $x_1$ 東京"
    html = render_html([row(nasty, 0.5, by_repetitions=[(1, {"P@1": 0.4}), (2, {"P@1": 0.5})]), row("b", 0.4)], FACTS, MACHINE)
    page = Page(html)
    assert "<script" not in html and "".join(page.texts).count(nasty) >= 3
    assert nasty in page.all("svg")[0]["aria-label"]


def test_a_dollar_in_a_chart_is_a_dollar():
    assert ">a $x_1$ b</text>" in charts.precision_chart([row("a $x_1$ b", 0.5)])


def test_colours_are_the_pages():
    html = render_html(three_rows(), FACTS, MACHINE)
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert (
        "var(--c0)" in drawn
        and "var(--full)" in drawn
        and not re.search(r"#[0-9a-f]{6}\b", re.sub(r'(id|href)="[^"]*"', "", drawn))
    )
    for variable in set(re.findall(r"var\((--\w+)\)", html)):
        assert f"{variable}:" in html


def test_a_full_head_is_grey_and_the_palette_comes_round():
    rows = [row("f", 0.5, table="identity"), *(row(str(i), 0.5) for i in range(7))]
    assert charts.colours(rows) == [charts.FULL, *charts.PALETTE, charts.PALETTE[0]]


def test_one_configuration_will_do():
    html = render_html([row("one", 0.5, by_repetitions=[(1, {"P@1": 0.5})])], FACTS, MACHINE)
    assert len(Page(html).all("svg")) == 3 and "1 configuration compared" in html  # no curve over repetitions
    html = render_html([row("one", 0.5, parts_s={})], FACTS, MACHINE)
    assert len(Page(html).all("svg")) == 2 and "Time by part" not in html  # trained by an earlier version


def test_the_page_is_the_same_twice():
    assert render_html(three_rows(), FACTS, MACHINE) == render_html(three_rows(), FACTS, MACHINE)


def test_it_is_written_whole(tmp_path):
    write_report(tmp_path / "report.html", three_rows(), FACTS, MACHINE)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_html(three_rows(), FACTS, MACHINE)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_the_machine_is_named():
    machine = this_machine()
    assert {"CPU", "system", "python", "torch", "numpy"} <= set(machine) and all(machine.values())
    assert int(machine["cores"]) >= 1


# Pieces


@given(st.lists(st.floats(-100, 100), max_size=12), st.floats(0.01, 30))
def test_names_are_spread_in_order_and_no_further_than_needed(values, gap):
    values = sorted(values)
    places = charts.spread(values, gap)
    assert len(places) == len(values)
    assert all(b - a >= gap * (1 - 1e-9) - 1e-9 for a, b in itertools.pairwise(places))
    if all(b - a >= gap for a, b in itertools.pairwise(values)):
        assert places == pytest.approx(values)
    assert sum(places) == pytest.approx(sum(values), abs=1e-6)


def test_two_close_names_part_evenly():
    assert charts.spread([10.0, 10.0, 50.0], 2.0) == [9.0, 11.0, 50.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00042, "0.00042"),
        (0.0984, "0.098"),
        (0.5, "0.50"),
        (12.34, "12.3"),
        (99.96, "100"),
        (1234.5, "1,234"),
        (0.0999, "0.10"),
    ],
)
def test_numbers_have_three_figures(value, text):
    assert three(value) == text


def test_numbers_have_prefixes_and_units():
    assert [scaled(999), scaled(999.6), scaled(1_234_567), scaled(54e9, "B")] == ["999", "1.00 k", "1.23 M", "54.0 GB"]
    assert [plain(204.9, "s"), percent(0.94125), percent(None)] == ["205 s", "94.12", "-"]


@pytest.mark.parametrize("render", [render_table, lambda rows: render_html(rows, FACTS, MACHINE)])
def test_bad_rows_are_named(render):
    with pytest.raises(ConfigError, match="there is no configuration to report: give one or more"):
        render([])
    with pytest.raises(ConfigError, match="must have different names, got a, a"):
        render([row("a", 0.5), row("a", 0.6)])
    bare = Row(**{f: getattr(row("a", 0.5), f) for f in Row.__dataclass_fields__} | {"metrics": {"MAP": 0.5}})
    with pytest.raises(ConfigError, match="no configuration has a P@k to report"):
        render([bare])
