"""`make previews`: draws each dashboard from its file and three minutes of real data.

It writes docs/dashboard-*.png. Layout, titles, units, thresholds and colours are those of the
dashboard file; Grafana's own rendering is more polished. The day is an ordinary one: 1,000 signups.
"""

import json
import math
import random
import re
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Wedge

from testbed import ROOT
from testbed.database import Postgres
from testbed.load import Repeated
from testbed.monitoring import Prometheus
from testbed.nginx import Nginx
from testbed.programs import Program, free_port, listens
from testbed.service import Service, user

WIDTH, ROW, DPI = 1280, 38, 100  # image width and grid row in pixels; pixels per inch
BACK, PANEL, TEXT, FAINT, GRID = "#111217", "#181b1f", "#ccccdc", "#8e8e99", "#2c2f36"
COLORS = {"green": "#73bf69", "yellow": "#fade2a", "light-yellow": "#ffee52", "orange": "#ff9830"}
COLORS |= {"light-orange": "#ffb357", "red": "#f2495c", "dark-red": "#c4162a"}
COLORS |= {"blue": "#5794f2", "purple": "#b877d9", "gray": "#8e8e99"}
PALETTE = ["#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9"]
VARIABLES = {"$job": "signup-server", "$namespace": "", "$instance": ".+", "$goal": "1000"}
plt.rcParams |= {"legend.frameon": False, "legend.labelcolor": TEXT, "legend.fontsize": 7.5}
plt.rcParams |= {"legend.handlelength": 1, "legend.columnspacing": 1}
RATE_INTERVAL = "10s"  # for scrapes every second
DAY = 180  # seconds
# What is wrong with these of 151 requests: an odd number, as nginx alternates between two replicas.
MISTAKES = {0: {"email": "registered@example.com"}, 31: {"email": "ada@example"}}
MISTAKES |= {60: {"first_name": " "}, 91: {"email": "?"}, 120: {"last_name": ""}}

# Pixels to the left of and below a plot, for its axes and legend.
MARGINS = {"timeseries": (66, 46), "heatmap": (66, 24), "barchart": (80, 24)}

Series = dict[str, list[tuple[float, float]]]
Query = Callable[[dict[str, Any]], Series]


def format_value(value: float, unit: str, decimals: int | None = None) -> str:
    """Return the value as Grafana formats it with this unit."""
    if unit == "s":
        value, suffix = (value * 1000, " ms") if abs(value) < 1 else (value, " s")
    elif unit in {"bytes", "Bps"}:
        power = min(int(math.log(max(abs(value), 1), 1024)), 3)
        suffix = f" {['B', 'KiB', 'MiB', 'GiB'][power]}" + ("/s" if unit == "Bps" else "")
        value /= 1024**power
    else:
        suffix = {"percent": "%", "suffix:/s": "/s", "reqps": " req/s", "short": ""}[unit]
        if abs(value) >= 1000 and decimals is None:
            value, suffix = value / 1000, f" K{suffix}"
    if decimals is None:
        return f"{value:.3g}{suffix}"
    return f"{value:.{decimals}f}{suffix}"


def color_of(panel: dict[str, Any], name: str, position: int) -> str:
    for override in _overrides(panel, name):
        for change in override["properties"]:
            if change["id"] == "color":
                return COLORS[change["value"]["fixedColor"]]
    return PALETTE[position % len(PALETTE)]


def draw_number(axes: Axes, panel: dict[str, Any], series: Series) -> None:
    """Draw a stat, a gauge or a bar gauge."""
    axes.axis("off")
    defaults = panel["fieldConfig"]["defaults"]
    ((_, value),) = next(iter(series.values()))
    text = format_value(value, defaults["unit"], defaults.get("decimals"))
    steps = defaults["thresholds"]["steps"]
    color = COLORS[[s["color"] for s in steps if s["value"] is None or value >= s["value"]][-1]]
    share = value / defaults["max"] if "max" in defaults else 0
    if panel["type"] == "gauge":
        axes.set(xlim=(-1.1, 1.1), ylim=(-0.15, 1.05), aspect="equal")
        axes.add_patch(Wedge((0, 0), 1, 0, 180, width=0.25, color=GRID))
        axes.add_patch(Wedge((0, 0), 1, 180 * (1 - min(share, 1)), 180, width=0.25, color=color))
        axes.text(0, 0.15, text, ha="center", va="center", color=color, size=16, weight="bold")
    elif panel["type"] == "bargauge":
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.barh(0.5, 0.85, height=0.6, color=GRID)
        axes.barh(0.5, 0.85 * min(share, 1), height=0.6, color=color)
        axes.text(0.99, 0.5, text, ha="right", va="center", color=color, size=18, weight="bold")
    else:
        axes.text(0.5, 0.45, text, ha="center", va="center", color=color, size=24, weight="bold")


def draw_times(axes: Axes) -> None:
    axes.tick_params(colors=FAINT, labelsize=8, length=0)
    axes.xaxis.set_major_formatter(lambda at, _: time.strftime("%H:%M", time.localtime(at)))
    axes.xaxis.set_major_locator(mpl.ticker.MultipleLocator(60))


def draw_lines(axes: Axes, panel: dict[str, Any], series: Series) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    draw_times(axes)
    axes.grid(color=GRID, linewidth=0.6)
    axes.yaxis.set_major_formatter(lambda value, _: format_value(value, defaults["unit"]))
    axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
    # Dashed, and not part of the stack.
    lines = {name for name in series if "lineStyle" in json.dumps(_overrides(panel, name))}
    below: dict[float, float] = {}
    for position, (name, samples) in enumerate(series.items()):
        color = color_of(panel, name, position)
        times = [at for at, _ in samples]
        values = [value for _, value in samples]
        if defaults["custom"]["stacking"]["mode"] == "normal" and name not in lines:
            bottom = [below.get(at, 0) for at in times]
            values = [low + value for low, value in zip(bottom, values, strict=True)]
            axes.fill_between(times, bottom, values, color=color, alpha=0.7, lw=0, label=name)
            below |= dict(zip(times, values, strict=True))
        else:
            style = "--" if name in lines else "-"
            axes.plot(times, values, style, color=color, linewidth=1.4, label=name)
    axes.set_ylim(bottom=defaults.get("min", 0), top=defaults.get("max"))
    if axes.get_ylim()[1] < 1e-9 or max(v for s in series.values() for _, v in s) == 0:
        axes.set_ylim(0, 1)
    if defaults["unit"] == "bytes":
        step = 2 ** math.ceil(math.log2(axes.get_ylim()[1] / 5))
        axes.yaxis.set_major_locator(mpl.ticker.MultipleLocator(step))
    if "thresholdsStyle" in defaults["custom"]:
        for step in defaults["thresholds"]["steps"]:
            if step["value"] is not None and step["value"] < axes.get_ylim()[1]:
                axes.axhline(step["value"], color=COLORS[step["color"]], ls="--", lw=1)


def _overrides(panel: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [o for o in panel["fieldConfig"]["overrides"] if o["matcher"]["options"] == name]


def draw_pie(axes: Axes, panel: dict[str, Any], series: Series) -> None:
    values = {name: samples[-1][1] for name, samples in series.items()}
    total = sum(values.values())
    colors = [color_of(panel, name, n) for n, name in enumerate(values)]
    if total:
        axes.pie(list(values.values()), colors=colors, wedgeprops={"width": 0.35}, center=(-1, 0))
    axes.set(xlim=(-2.2, 3.2), ylim=(-1.3, 1.3))
    for row, (name, value) in enumerate(values.items()):
        y = 0.8 - 0.32 * row
        axes.text(0.4, y, "■", color=colors[row], va="center", size=9)
        axes.text(0.6, y, name, color=TEXT, va="center", size=9)
        share = 100 * value / (total or 1)
        axes.text(3.2, y, f"{value:.0f}  {share:.0f}%", color=TEXT, va="center", ha="right", size=9)
    axes.axis("off")


def draw_bars(axes: Axes, panel: dict[str, Any], series: Series) -> None:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    values = {name: samples[-1][1] for name, samples in series.items()}
    axes.barh(list(values), list(values.values()), color=PALETTE[0], height=0.6)
    for name, value in values.items():
        axes.text(value, name, f" {format_value(value, unit)}", color=TEXT, va="center", size=8)  # type: ignore[arg-type]
    axes.set_xlim(0, max(*values.values(), 1e-9) * 1.25)
    axes.tick_params(colors=FAINT, labelsize=9, length=0)
    axes.xaxis.set_major_formatter(lambda value, _: format_value(value, unit))
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(3))


def draw_heatmap(axes: Axes, panel: dict[str, Any], series: Series) -> None:
    bounds = sorted(series, key=float)
    times = [at for at, _ in series[bounds[0]]]
    counts = {le: dict(series[le]) for le in bounds}
    rows = [[counts[bounds[0]][at] for at in times]]
    for low, high in pairwise(bounds):  # buckets are cumulative
        rows.append([max(counts[high][at] - counts[low][at], 0) for at in times])
    cells = [[value if value > 1e-9 else math.nan for value in row] for row in rows]
    axes.pcolormesh(times, range(len(bounds)), cells, cmap="Oranges_r", shading="nearest")
    axes.set_yticks([n + 0.5 for n in range(len(bounds))])
    axes.set_yticklabels(["∞" if le == "+Inf" else format_value(float(le), "s") for le in bounds])
    draw_times(axes)


def draw_table(axes: Axes, panel: dict[str, Any], series: Series) -> None:
    axes.axis("off")
    for row, name in enumerate(sorted(series)[:6]):
        axes.text(0.01, 0.9 - 0.17 * row, name, color=TEXT, va="center", size=9)


DRAWINGS = {"stat": draw_number, "gauge": draw_number, "bargauge": draw_number}
DRAWINGS |= {"timeseries": draw_lines, "heatmap": draw_heatmap, "table": draw_table}
DRAWINGS |= {"piechart": draw_pie, "barchart": draw_bars}


def draw(dashboard: dict[str, Any], query: Query, path: Path) -> None:
    """Write a PNG of the dashboard, 1280 pixels wide; `query` returns the series of a target."""
    rows = 1 + max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    height = rows * ROW
    figure = plt.figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor=BACK)

    def place(left: float, top: float, right: float, bottom: float) -> Axes:
        """Add axes between these pixels, counted from the upper left corner."""
        box = (left / WIDTH, 1 - bottom / height, (right - left) / WIDTH, (bottom - top) / height)
        axes = figure.add_axes(box, facecolor=PANEL)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes

    figure.text(12 / WIDTH, 1 - 19 / height, dashboard["title"], color=TEXT, size=14, va="center")
    note = "Drawn by `make previews` from real data, a day in 3 minutes; Grafana looks different."
    figure.text(1 - 12 / WIDTH, 1 - 19 / height, note, color=FAINT, size=8, ha="right", va="center")
    for panel in dashboard["panels"]:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        left, right = x * WIDTH / 24 + 3, (x + w) * WIDTH / 24 - 3
        top, bottom = (1 + y) * ROW + 3, (1 + y + h) * ROW - 3
        background = place(left, top, right, bottom)
        background.set(xticks=[], yticks=[])
        at = (left + 8) / WIDTH, 1 - (top + 15) / height
        figure.text(*at, panel["title"], color=TEXT, size=9.5, weight="bold", va="center")
        series: Series = {}
        for target in panel["targets"]:
            series |= query(target)
        margin, foot = MARGINS.get(panel["type"], (8, 8))
        axes = place(left + margin, top + 30, right - 12, bottom - foot)
        if series:
            DRAWINGS[panel["type"]](axes, panel, series)
        else:
            message = panel["fieldConfig"]["defaults"]["noValue"]
            axes.text(0.5, 0.5, message, ha="center", va="center", color=FAINT, size=11)
            axes.axis("off")
        if axes.get_legend_handles_labels()[1]:
            shown = axes.get_legend_handles_labels()
            background.legend(*shown, loc="lower left", ncols=7)
    figure.savefig(path, facecolor=BACK)
    plt.close(figure)


def with_defaults(expression: str) -> str:
    """Return the expression with the default values of the dashboard variables."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def ask(prometheus: Prometheus, start: float, end: float, rate_interval: str) -> Query:
    """Return a query for a target's series between `start` and `end`, in seconds since 1970."""

    def query(target: dict[str, Any]) -> Series:
        expression = with_defaults(target["expr"]).replace("$__rate_interval", rate_interval)
        if target["instant"]:
            answer = prometheus.get("/api/v1/query", query=expression, time=end)
        else:
            period = {"start": start, "end": end, "step": (end - start) / 120}
            answer = prometheus.get("/api/v1/query_range", query=expression, **period)
        return {
            legend(target, found["metric"]): [
                (at, float(value)) for at, value in found.get("values") or [found["value"]]
            ]
            for found in answer["data"]["result"]
        }

    return query


def legend(target: dict[str, Any], labels: dict[str, str]) -> str:
    if target["legendFormat"]:
        return re.sub(r"{{(\w+)}}", lambda m: labels.get(m[1], ""), target["legendFormat"])
    shown = ("severity", "alertname", "instance", "operation")
    return "    ".join(labels[name] for name in shown if name in labels)


class NginxExporter(Program):
    def __init__(self, proxy: Nginx) -> None:
        self._status = f"http://127.0.0.1:{proxy.ports[8082]}/stub_status"
        self._port = free_port()

    def command(self) -> list[str]:
        options = [f"--web.listen-address=127.0.0.1:{self._port}"]
        return ["prometheus-nginx-exporter", f"--nginx.scrape-uri={self._status}", *options]

    def address(self) -> str | None:
        return f"http://127.0.0.1:{self._port}" if listens(self._port) else None


def quicken(queries: str) -> str:
    """Return rules or panels with windows and an interval that suit a day of three minutes."""
    return queries.replace("[5m]", "[1m]").replace("interval: 2m", "interval: 2s")


def main() -> None:
    """Send a day's requests, most of them around noon, and draw all dashboards."""
    with (
        Postgres() as postgres,
        Prometheus("1s", quicken) as prometheus,
        Service(DATABASE_URL=(url := postgres.new_database())) as first,
        Service(DATABASE_URL=url) as second,
        Nginx(first, second) as proxy,
        NginxExporter(proxy) as exporter,
    ):
        prometheus.set_targets("signup-server", first.url, second.url)
        prometheus.set_targets("nginx", exporter.url)
        start = time.time()

        def visit() -> None:
            noon = math.sin(math.pi * min((time.time() - start) / DAY, 1))
            time.sleep(random.expovariate(2.5 + 5 * noon))
            wrong = MISTAKES.get(proxy.answers.total() % 151, {})
            proxy.signup(json=user(f"{time.time_ns()}") | wrong)

        with Repeated(visit):
            time.sleep(DAY)
        query = ask(prometheus, start, time.time(), RATE_INTERVAL)
        for file in (ROOT / "grafana/dashboards").iterdir():
            path = ROOT / f"docs/dashboard-{file.stem}.png"
            draw(json.loads(quicken(file.read_text())), query, path)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
