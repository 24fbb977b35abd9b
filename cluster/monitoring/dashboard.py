"""The Grafana dashboard, from the table of panels.

`python -m cluster.monitoring.dashboard` writes `grafana/dashboard.json` anew.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.monitoring.panels import PANELS, Panel

FILE = Path(__file__).parent / "grafana" / "dashboard.json"
PROMETHEUS = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT, COLUMNS = 8, 8, 24  # of a panel, and of the page, in Grafana's units


def build() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    return {
        "uid": "onpolicy",
        "title": "onpolicy",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_datasource(), _runs()]},
        "panels": list(_placed()),
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "source"}


def _runs() -> dict[str, Any]:
    query = "label_values(ray_onpolicy_step, run)"
    return {
        "name": "run",
        "type": "query",
        "datasource": PROMETHEUS,
        "query": {"query": query, "refId": "runs"},
        "definition": query,
        "refresh": 2,  # when the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _placed() -> Iterator[dict[str, Any]]:
    columns = COLUMNS // WIDTH
    for number, panel in enumerate(PANELS):
        place = {"x": number % columns * WIDTH, "y": number // columns * HEIGHT}
        kind = "heatmap" if panel.by else "timeseries"
        yield {
            "id": number + 1,
            "type": kind,
            "title": panel.title,
            "description": panel.meaning,
            "datasource": PROMETHEUS,
            "gridPos": {**place, "w": WIDTH, "h": HEIGHT},
            "targets": [
                {"refId": chr(ord("A") + i), "datasource": PROMETHEUS, "expr": expr,
                 "legendFormat": legend, "range": True, "format": "time_series"}
                for i, (legend, expr) in enumerate(panel.queries.items())
            ],
            **(_heat() if panel.by else _lines(panel)),
        }  # fmt: skip


def _lines(panel: Panel) -> dict[str, Any]:
    custom: dict[str, Any] = {"lineWidth": 1, "showPoints": "auto", "spanNulls": True}
    if panel.log:
        custom["scaleDistribution"] = {"type": "log", "log": 10}
    if panel.stacked:
        custom |= {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 30}
    return {
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": custom, **panel.fixed},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def _heat() -> dict[str, Any]:
    """Rows by series; Grafana puts them in order, for their names are numbers."""
    return {
        "options": {
            "calculate": False,
            "rowsFrame": {"layout": "ge"},
            "cellGap": 1,
            "color": {
                "mode": "scheme", "scheme": "Viridis", "steps": 64, "scale": "exponential",
                "exponent": 0.5, "reverse": False,
            },
            "filterValues": {"le": 1e-9},  # nothing is drawn for nothing
            "yAxis": {"axisPlacement": "left", "reverse": False},
            "legend": {"show": True},
            "tooltip": {"mode": "single", "yHistogram": False},
        },
    }  # fmt: skip


def text() -> str:
    """What the file holds."""
    return json.dumps(build(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
