"""What a dashboard is made of, without any of Grafana's own words: queries, panels, rows, variables."""

from __future__ import annotations

from dataclasses import dataclass, field

DATASOURCE = "tritonmark-prometheus"  # uid in provisioning/datasources/prometheus.yml, chosen at first
COLUMNS = 24  # of Grafana's grid


@dataclass(frozen=True)
class Query:
    """PromQL and the name of its series, in which {{label}} is that label's value.

    `limit`: a bound that the other series are seen against, drawn dashed and red. `unit`: where it differs from the
    panel's. `table`: its columns are labels, as a table or bars need them.
    """

    expr: str
    legend: str = "__auto"
    limit: bool = False
    unit: str = ""
    table: bool = False


@dataclass(frozen=True)
class Panel:
    """One panel. `help` says what it shows and how to read it; `unit` is a Grafana unit id; `width` of 24 columns.

    `kind`: timeseries, states (a line a series, a colour a value), stat, bars (one bar a series) or table. The last
    three ask once, for the end of the shown time; the others ask for every point. `steps` are (from value, colour)
    pairs; below them the colour is `base`. `words` name values. `columns` name a table's columns, in their order, and
    the others are hidden; `units` are those of columns by their new names. `pivot` (label of the rows, label of the
    columns) makes a matrix of a table; `joined` makes one row of all queries' rows with the same value of that label.
    `link` is (column, title, URL).
    """

    title: str
    help: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    low: float | None = 0
    high: float | None = None
    decimals: int | None = None
    base: str = "green"
    steps: tuple[tuple[float, str], ...] = ()
    words: dict[str, tuple[str, str]] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    pivot: tuple[str, str] | None = None
    joined: str = ""
    link: tuple[str, str, str] | None = None
    stacked: bool = False
    named: bool = False  # a stat shows its series' name in place of the value


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Variable:
    """A choice at the top of the dashboard: the values of `label` in `series`; or of `values`; or a free text.

    `newest`: sorted from the end of the alphabet, so that the run that began last is chosen at first. `first`: what is
    chosen at first, where it is among the values.
    """

    name: str
    label: str
    help: str
    query: str = ""
    values: tuple[str, ...] = ()
    text: str = ""
    several: bool = True
    newest: bool = False
    first: str = ""
    hidden: bool = False


@dataclass(frozen=True)
class Mark:
    """An annotation: a line at each time that `expr` has as its value (Unix milliseconds)."""

    name: str
    expr: str
    colour: str
    title: str


@dataclass(frozen=True)
class Board:
    uid: str
    title: str
    help: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]
    marks: tuple[Mark, ...] = ()
    span: str = "now-15m"
    refresh: str = "5s"
