"""The dashboard's pages. Streamlit runs this file: `serve` starts it with the folders as arguments."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import streamlit as st

from atlas_lm.inspection.dashboard import finding, report_tables, run_tables, thinning
from atlas_lm.inspection.schema import Report
from atlas_lm.loggers.jsonl import read_rows
from atlas_lm.runs.listing import examine

LISTED = 200  # of the newest reports; a folder with more of them is given as the argument
RULES = 200  # of flagged steps in a chart
HEIGHT = 300  # pixels of a chart
REPORTS, COMPARE, RUNS = "Reports", "Compare", "Training runs"


@st.cache_data(show_spinner=False, max_entries=2 * LISTED)
def load(path: str, changed: tuple[int, int]) -> finding.Found:
    """`changed` makes the cache forget a file that was written again."""
    return finding.load(Path(path))


@st.cache_data(show_spinner=False, max_entries=20)
def load_rows(path: str, changed: tuple[int, int]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. ValueError, OSError: see `read_rows`."""
    return read_rows(path)


def draw_lines(rows: Sequence[dict[str, Any]], y: str, by: str, title: str, marks: Sequence[int] = ()) -> None:
    """Lines over steps; `marks`: steps with a red rule."""
    rows = thinning.thin_lines(rows, y, by)
    chart: Any = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=len(rows) < 400)
        .encode(
            x=alt.X("step:Q", axis=alt.Axis(tickMinStep=1, format="d")),
            y=alt.Y(f"{y}:Q", title=None, scale=alt.Scale(zero=False)),
            color=alt.Color(f"{by}:N", title=None, legend=alt.Legend(orient="bottom", columns=2, labelLimit=0)),
            tooltip=[{"field": name, "type": "nominal"} for name in rows[0]] if rows else [],
        )
    )
    if marks:
        flagged = alt.Data(values=[{"step": step} for step in marks[:: 1 + len(marks) // RULES]])
        chart += alt.Chart(flagged).mark_rule(color="#b00020", opacity=0.5).encode(x="step:Q")
    st.altair_chart(chart.properties(height=HEIGHT, title=title))


def draw_heat(rows: Sequence[dict[str, Any]], x: str, y: str, title: str) -> None:
    """A heat map of `value`."""
    chart = (
        alt.Chart(alt.Data(values=thinning.thin_heat(rows, x, y)))
        .mark_rect()
        .encode(
            x=alt.X(f"{x}:O", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y(f"{y}:O", sort="descending"),
            color=alt.Color("value:Q", title=None, scale=alt.Scale(scheme="viridis")),
            tooltip=[f"{x}:O", f"{y}:O", "value:Q"],
        )
    )
    st.altair_chart(chart.properties(height=HEIGHT, title=title))


def choose(label: str, figures: dict[str, str], key: str) -> str:
    """One of the figures, by what it is called."""
    found = st.selectbox(label, list(figures), format_func=lambda name: figures[name], key=key)
    return str(found)


def tokens_tab(report: Report) -> None:
    st.caption(
        f"Background: surprisal, white at 0 and orange from {report_tables.STRONG:.0f} bits. Underlined: flagged."
    )
    st.html(report_tables.generated(report))
    st.dataframe(report_tables.step_rows(report), hide_index=True)


def entropy_tab(report: Report) -> None:
    rows = [
        {"step": row["step"], "token": row["token"], "figure": name.partition("_")[0], "bits": row[name]}
        for row in report_tables.step_rows(report)
        for name in ("entropy_bits", "surprisal_bits")
        if row[name] is not None
    ]
    if not rows:
        st.info("This report has no entropies.")
        return
    draw_lines(rows, "bits", "figure", "bits", sorted(report_tables.pointed_at(report)))
    st.caption("Red: steps that a flag points to.")


def attention_tab(report: Report) -> None:
    parts = {"self-attention": report.layers, "cross-attention": report.cross}
    there = {name: columns for name, columns in parts.items() if columns.steps or columns.head_entropy}
    if not there:
        st.info("This report has no layers: capture was off.")
    for name, columns in there.items():
        st.subheader(name)
        known = {figure: title for figure, title in report_tables.PER_STEP.items() if getattr(columns, figure)}
        if known:
            figure = choose("figure", known, f"figure {name}")
            draw_heat(report_tables.layer_rows(report, columns, figure), "step", "layer", known[figure])
        for figure, title in report_tables.PER_HEAD.items():
            if getattr(columns, figure):
                rows = report_tables.head_rows(report, getattr(columns, figure))
                draw_heat(rows, "head", "layer", f"{title}, mean over steps")


def memory_tab(report: Report) -> None:
    known = {name: title for name, title in report_tables.OF_MEMORY.items() if getattr(report.memory, name)}
    if not known:
        st.info("This model has no memory, or capture was off.")
        return
    for name, title in known.items():
        draw_lines(report_tables.memory_rows(report, name), "value", "memory", title)
    rows = [row for row in report_tables.residual_rows(report) if row["value"] is not None]
    if rows:
        draw_lines(rows, "value", "series", "error of retrieval")


def prompt_tab(report: Report) -> None:
    st.html(report_tables.prompt(report))
    st.caption(f"{len(report.prompt.tokens)} tokens. Background: surprisal; grey where there is none.")
    rows = report_tables.prompt_layer_rows(report)
    if rows:
        st.dataframe(rows, hide_index=True)
    for figure, title in report_tables.OF_PROMPT.items():
        if getattr(report.prompt, figure):
            draw_heat(report_tables.head_rows(report, getattr(report.prompt, figure)), "head", "layer", title)


def flags_tab(report: Report) -> None:
    st.dataframe(report_tables.flag_rows(report), hide_index=True)
    pointed = report_tables.pointed_at(report)
    if pointed:
        step = st.selectbox("step", sorted(pointed), format_func=lambda i: f"step {i}: {', '.join(pointed[i])}")
        st.html(report_tables.around(report, step))
    for warning in report.warnings:
        st.warning(warning)


def latency_tab(report: Report) -> None:
    of = report.latency
    named = {"seconds": of.total, "to the first token": of.time_to_first_token, "between tokens": of.inter_token_mean}
    for column, (name, value) in zip(st.columns(3), named.items(), strict=True):
        column.metric(name, "–" if value is None else f"{value:.4g} s")
    rows = [row for row in report_tables.latency_rows(report) if row["seconds"] is not None]
    if rows:
        draw_lines(rows, "seconds", "part", "seconds")
    st.dataframe(report_tables.operation_rows(report), hide_index=True)


TABS = {
    "Tokens": tokens_tab, "Entropy": entropy_tab, "Attention": attention_tab, "Memory": memory_tab,
    "Prompt": prompt_tab, "Flags": flags_tab, "Latency": latency_tab,
}  # fmt: skip


def show_report(report: Report) -> None:
    """One report in tabs."""
    if report.fired:
        st.error(f"Flags: {', '.join(report.fired)}")
    else:
        st.success("No flag fired.")
    for tab, draw in zip(st.tabs(list(TABS)), TABS.values(), strict=True):
        with tab:
            draw(report)
    with st.expander("How it was inspected"):
        st.dataframe(report_tables.settings(report), hide_index=True)


def reports_page(found: Sequence[finding.Found], names: dict[Path, str]) -> None:
    whole = {names[item.path]: item.report for item in found if item.report is not None}
    st.dataframe([{"report": name, **report_tables.listed(report)} for name, report in whole.items()], hide_index=True)
    broken = [item for item in found if item.error]
    if broken:
        with st.expander(f"{len(broken)} that cannot be read", expanded=True):
            for item in broken:
                st.text(f"{names[item.path]}: {item.error}")
    if whole:
        chosen = st.selectbox("report", list(whole))
        show_report(whole[chosen])


def compare_page(found: Sequence[finding.Found], names: dict[Path, str]) -> None:
    whole = {names[item.path]: item.report for item in found if item.report is not None}
    if len(whole) < 2:
        st.info("Two reports are needed to compare.")
        return
    left, right = st.columns(2)
    a = left.selectbox("A", list(whole), index=0)
    b = right.selectbox("B", list(whole), index=1)
    pair = {"A": whole[a], "B": whole[b]}
    rows = [
        {"step": i, "report": name, "bits": bits}
        for name, report in pair.items()
        for i, bits in enumerate(report.steps.entropy_bits)
        if bits is not None
    ]
    if rows:
        draw_lines(rows, "bits", "report", "entropy (bits)")
    for column, (name, report) in zip(st.columns(2), pair.items(), strict=True):
        column.subheader(f"{name}: {report.model.name}")
        column.html(report_tables.generated(report))
    st.dataframe(report_tables.flag_comparison(*pair.values()), hide_index=True)
    st.dataframe(report_tables.comparison(*pair.values()), hide_index=True)


def runs_page(outputs: Path) -> None:
    folders = finding.run_folders(outputs)
    if not folders:
        st.info(f"{outputs} holds no training runs.")
        return
    entries = {finding.short(folder, [outputs]): examine(folder) for folder in folders}
    st.dataframe(
        [
            {"run": name, "state": e.state, "step": e.step, "of": e.steps, "loss": e.loss, "error": e.error}
            for name, e in entries.items()
        ],
        hide_index=True,
    )
    chosen = st.selectbox("run", list(entries))
    path = entries[chosen].folder / "metrics.jsonl"
    try:
        rows = load_rows(str(path), finding.stamp(path))
    except (ValueError, OSError) as error:
        st.error(f"{chosen} has no metrics that can be read: {error}")
        return
    happened = run_tables.events(rows)
    st.subheader("Spikes, rollbacks and skipped steps")
    if happened:
        st.dataframe(happened, hide_index=True)
    else:
        st.success("None.")
    marks = sorted({row["step"] for row in happened if row["step"] is not None})
    for i, (title, points) in enumerate(run_tables.charts(rows).items()):
        if i % 2 == 0:
            columns = st.columns(2)
        with columns[i % 2]:
            draw_lines(points, "value", "metric", title, marks)


def main(folder: Path, outputs: Path) -> None:
    """The page that is chosen at the side."""
    st.set_page_config("atlas-lm", layout="wide")
    st.sidebar.title("atlas-lm")
    page = st.sidebar.radio("page", [REPORTS, COMPARE, RUNS], label_visibility="collapsed")
    st.title(page)
    if page == RUNS:
        runs_page(outputs)
        return
    places = list(dict.fromkeys([folder, outputs]))
    paths = finding.report_files(places)
    if not paths:
        st.info(f"No reports below {' and '.join(map(str, places))}: python -m atlas_lm inspect writes them.")
        return
    if len(paths) > LISTED:
        st.caption(f"The newest {LISTED} of {len(paths)} reports.")
    found = [load(str(path), finding.stamp(path)) for path in paths[:LISTED]]
    names = {item.path: finding.short(item.path, places) for item in found}
    (reports_page if page == REPORTS else compare_page)(found, names)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
