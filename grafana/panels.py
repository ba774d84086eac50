"""From spec.py's words to Grafana's, by the Grafana Foundation SDK."""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import common as words
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from grafana.spec import COLUMNS, DATASOURCE, Board, Mark, Panel, Query, Row, Variable

SOURCE = words.DataSourceRef(type_val="prometheus", uid="${datasource}")  # chosen at the top: an import may have any
KINDS = {"timeseries": timeseries.Panel, "stat": stat.Panel, "table": table.Panel, "bars": bargauge.Panel,
         "states": statetimeline.Panel}  # fmt: skip
ALL = "$__all"
RED_DASHES = [
    ("color", {"mode": "fixed", "fixedColor": "red"}),
    ("custom.lineStyle", {"fill": "dash", "dash": [8, 6]}),
    ("custom.lineWidth", 2),
    ("custom.fillOpacity", 0),
    ("custom.stacking", {"mode": "none", "group": "A"}),
]


def board(spec: Board) -> models.Dashboard:
    """The dashboard as the SDK's own object; its to_json() is what Grafana reads."""
    built = (
        dashboard.Dashboard(spec.title).uid(spec.uid).description(spec.help).tags(["tritonmark"]).readonly()
        .timezone("browser").time(spec.span, "now").refresh(spec.refresh)
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .variables([_source(), *map(_variable, spec.variables)]).annotations([_mark(m) for m in spec.marks])
        .link(dashboard.DashboardLink("Tritonmark").type(models.DashboardLinkType.DASHBOARDS).tags(["tritonmark"])
              .include_vars(False).keep_time(False))
    )  # fmt: skip
    number = 0
    for row in spec.rows:
        _check(row)
        number += 1
        built = built.with_row(dashboard.Row(row.title).id(number))
        for panel in row.panels:
            number += 1
            built = built.with_panel(_panel(panel).id(number))
    result = built.build()
    for link in result.links or []:
        link.placement = None  # in the bar; the SDK's default hides it in a menu of Grafana 12.3 and later
    result.schema_version = 41  # of Grafana 12.1, which docker-compose.yml starts; newer ones migrate it
    return result


def _check(row: Row) -> None:
    """The SDK begins a new line at 24 columns or more: lines that are not full would overlap."""
    at = 0
    for panel in row.panels:
        at += panel.width
        if at > COLUMNS:
            raise ValueError(f"panel {panel.title!r} of row {row.title!r} does not fit its line: {at} columns")
        at %= COLUMNS


def _panel(spec: Panel) -> Any:
    built = KINDS[spec.kind]().title(spec.title).description(spec.help).unit(spec.unit).datasource(SOURCE)
    built = built.span(spec.width).height(spec.height)
    for number, query in enumerate(spec.queries):
        ref = chr(ord("A") + number)
        built = built.with_target(_query(query, ref, spec))
        properties = ([("unit", query.unit)] if query.unit else []) + (RED_DASHES if query.limit else [])
        if properties:
            built = built.override_by_query(ref, [models.DynamicConfigValue(k, v) for k, v in properties])
    if spec.low is not None:
        built = built.min(spec.low)
    if spec.high is not None:
        built = built.max(spec.high)
    if spec.decimals is not None:
        built = built.decimals(spec.decimals)
    if spec.words:
        told = {k: models.ValueMappingResult(text=t, color=c) for k, (t, c) in spec.words.items()}
        built = built.mappings([models.ValueMap(options=told)])
    if spec.steps or spec.kind in ("stat", "bars"):
        steps = [models.Threshold(None, spec.base), *(models.Threshold(v, c) for v, c in spec.steps)]
        built = built.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    return _FINISH[spec.kind](built, spec)


def _query(spec: Query, ref: str, panel: Panel) -> prometheus.Dataquery:
    query = prometheus.Dataquery().expr(spec.expr).legend_format(spec.legend).ref_id(ref).datasource(SOURCE)
    query = query.instant() if panel.kind in ("stat", "table", "bars") else query.range()
    return query.format(PromQueryFormat.TABLE if spec.table else PromQueryFormat.TIME_SERIES)


def _lines(built: Any, spec: Panel) -> Any:
    built = (
        built.line_width(1).fill_opacity(30 if spec.stacked else 8).show_points(words.VisibilityMode.AUTO)
        .span_nulls(False).tooltip(common.VizTooltipOptions().mode(words.TooltipDisplayMode.MULTI))
        .legend(common.VizLegendOptions().display_mode(words.LegendDisplayMode.LIST).show_legend(True)
                .placement(words.LegendPlacement.BOTTOM).calcs([]))
    )  # fmt: skip
    if spec.stacked:
        built = built.stacking(common.StackingConfig().mode(words.StackingMode.NORMAL).group("A"))
    if spec.steps:
        built = built.thresholds_style(common.GraphThresholdsStyleConfig().mode(words.GraphThresholdsStyleMode.LINE))
    return built


def _stat(built: Any, spec: Panel) -> Any:
    return (
        built.reduce_options(_last()).color_mode(words.BigValueColorMode.BACKGROUND)
        .graph_mode(words.BigValueGraphMode.NONE).justify_mode(words.BigValueJustifyMode.AUTO)
        .text_mode(words.BigValueTextMode.NAME if spec.named else words.BigValueTextMode.AUTO)
    )  # fmt: skip


def _bars(built: Any, spec: Panel) -> Any:
    return (
        built.reduce_options(_last()).orientation(words.VizOrientation.HORIZONTAL)
        .display_mode(words.BarGaugeDisplayMode.BASIC).value_mode(words.BarGaugeValueMode.TEXT).show_unfilled(True)
    )  # fmt: skip


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).values(False).fields("")


def _states(built: Any, spec: Panel) -> Any:
    return built.merge_values(True).show_value(words.VisibilityMode.NEVER).row_height(0.8).fill_opacity(80)


def _table(built: Any, spec: Panel) -> Any:
    built = built.show_header(True).cell_options(words.TableAutoCellOptions())
    if spec.pivot:
        row, column = spec.pivot
        options = {"rowField": row, "columnField": column, "valueField": "Value", "emptyValue": "null"}
        built = built.with_transformation(models.DataTransformerConfig("groupingToMatrix", options=options))
    else:
        if spec.joined:
            options = {"byField": spec.joined, "mode": "outer"}
            built = built.with_transformation(models.DataTransformerConfig("joinByField", options=options))
        keep = {"include": {"names": list(spec.columns)}}
        built = built.with_transformation(models.DataTransformerConfig("filterFieldsByName", options=keep))
        order = {name: k for k, name in enumerate(spec.columns)}
        options: dict[str, Any] = {"renameByName": spec.columns, "indexByName": order, "excludeByName": {}}
        built = built.with_transformation(models.DataTransformerConfig("organize", options=options))
    for column, unit in spec.units.items():
        built = built.override_by_name(column, [models.DynamicConfigValue("unit", unit)])
    if spec.link:
        column, title, url = spec.link
        link = [{"title": title, "url": url, "targetBlank": True}]
        built = built.override_by_name(column, [models.DynamicConfigValue("links", link)])
    return built


_FINISH = {"timeseries": _lines, "stat": _stat, "bars": _bars, "table": _table, "states": _states}


def _source() -> Any:
    """Which Prometheus: the provisioned one where there is one, otherwise whichever Grafana has."""
    return (
        dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus").multi(False).include_all(False)
        .description("The Prometheus that scrapes this bench.")
        .current(models.VariableOption(selected=True, text=DATASOURCE, value=DATASOURCE))
    )  # fmt: skip


def _variable(spec: Variable) -> Any:
    if spec.text:
        return dashboard.TextBoxVariable(spec.name).label(spec.label).description(spec.help).default_value(spec.text)
    if spec.values:
        first = models.VariableOption(text=spec.values[0], value=spec.values[0])
        built = dashboard.CustomVariable(spec.name).values(",".join(spec.values)).current(first)
        return built.label(spec.label).description(spec.help).multi(False).include_all(False)
    order = models.VariableSort.ALPHABETICAL_DESC if spec.newest else models.VariableSort.ALPHABETICAL_ASC
    built = (
        dashboard.QueryVariable(spec.name).label(spec.label).description(spec.help).datasource(SOURCE)
        .query({"query": spec.query, "refId": spec.name}).definition(spec.query).sort(order)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).multi(spec.several).include_all(spec.several)
    )  # fmt: skip
    if spec.several:
        built = built.all_value(".*").current(models.VariableOption(selected=True, text=["All"], value=[ALL]))
    if spec.first:
        built = built.current(models.VariableOption(selected=True, text=spec.first, value=spec.first))
    return built.hide(models.VariableHide.HIDE_VARIABLE) if spec.hidden else built


def _mark(spec: Mark) -> Any:
    return (
        dashboard.AnnotationQuery().name(spec.name).datasource(SOURCE).enable(True).icon_color(spec.colour)
        .expr(spec.expr).use_value_for_time(True).title_format(spec.title).step("15s")
    )  # fmt: skip
