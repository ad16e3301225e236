"""Draw the block and the ladder of safeguards, docs/block.svg and docs/ladder.svg: python -m benchmarks.pictures

Boxes are filled, so that their text is legible on any background; lines and text outside of them are of a middle grey.
"""

from __future__ import annotations

from html import escape

from atlas_lm.files import ROOT, write_atomically

GREY, INK = "#808890", "#1c2430"
PLAIN, ATTENTION, MEMORY, GATE = "#e3e7ec", "#bfd7f2", "#f6d9a8", "#c9e6c4"
RUNGS = (  # colour, name, what happens there, the safeguards
    ("#cfe3f7", "see", "measured, logged, judged",
     "niah_probe, memory_contribution, gate_monitor, persistent_memory_check, rank_agreement, hang_watch"),
    ("#d5ecd0", "clip", "a step is made smaller",
     "proactive_clipping, chunk_size_scheduler, loss_weight_schedule, five_cat_probe"),
    ("#f3eab8", "skip", "a step is dropped", "nonfinite_guard, outlier_guard, weight_integrity"),
    ("#f8d8a6", "roll back", "an earlier state, other data", "spike_rollback"),
    ("#f4bfb4", "stop", "all ranks, everything saved", "the fourth spike, and every limit: report, exit code 1"),
    ("#dccdf0", "resume", "bit for bit", "step_checkpoint, interrupt, random_state"),
)  # fmt: skip


def text(
    x: float, y: float, words: str, size: int = 13, fill: str = INK, anchor: str = "middle", weight: int = 400
) -> str:
    """One line of text."""
    font = f'font-family="Helvetica, Arial, sans-serif" font-size="{size}" font-weight="{weight}"'
    return f'<text x="{x:g}" y="{y:g}" {font} fill="{fill}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, *lines: str) -> str:
    """A filled box with lines of text in its middle, the first one bold."""
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7" fill="{fill}" stroke="{GREY}"/>'
    top = y + height / 2 - 9 * (len(lines) - 1) + 4.5
    rows = [text(x + width / 2, top + 18 * i, line, 13 if i == 0 else 11, weight=400 if i else 600)
            for i, line in enumerate(lines)]  # fmt: skip
    return "\n".join([shape, *rows])


def arrow(*points: tuple[float, float]) -> str:
    """A line through the points with a head at its end."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{GREY}" stroke-width="1.6" marker-end="url(#head)"/>'


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    """The SVG."""
    head = (
        f'<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M 0 0 L 8 4 L 0 8 z" fill="{GREY}"/></marker>'
    )
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    return "\n".join([opening, f"<title>{escape(title)}</title>", f"<defs>{head}</defs>", *parts, "</svg>"]) + "\n"


def plus(x: float, y: float) -> str:
    """Where a branch is added to the stream."""
    circle = f'<circle cx="{x:g}" cy="{y:g}" r="11" fill="{PLAIN}" stroke="{GREY}"/>'
    return circle + text(x, y + 5, "+", 16, weight=600)


def block() -> str:
    """docs/block.svg: attention and memory side by side."""
    return picture(860, 324, "A block: window attention and memory side by side, mixed by a gate", [
        text(24, 46, "x", 15, GREY, weight=600), arrow((34, 41), (543, 41)), plus(555, 41), arrow((567, 41), (788, 41)),
        plus(800, 41), arrow((812, 41), (850, 41)),
        arrow((60, 41), (60, 112)), box(22, 114, 76, 36, PLAIN, "RMSNorm"),
        arrow((98, 132), (146, 132)),
        box(148, 106, 226, 52, ATTENTION, "window attention", "the last tokens, each of them"),
        arrow((120, 132), (120, 240), (146, 240)),
        f'<rect x="148" y="178" width="226" height="136" rx="7" fill="{MEMORY}" stroke="{GREY}"/>',
        text(261, 198, "memory: learns while it reads", 13, weight=600),
        box(160, 208, 202, 44, "#fdf3df", "global memory", "long chunks, carried along"),
        box(160, 260, 202, 44, "#fdf3df", "local memories", "short chunks, new at every shard"),
        arrow((374, 132), (410, 132), (410, 168), (428, 168)), arrow((374, 240), (410, 240), (410, 196), (428, 196)),
        box(430, 152, 192, 60, GATE, "gate", "g · memory + (1 − g) · attention"),
        arrow((555, 152), (555, 54)),
        arrow((693, 41), (693, 112)), box(650, 114, 86, 52, PLAIN, "RMSNorm", "SwiGLU"),
        arrow((736, 140), (800, 140), (800, 54)),
    ])  # fmt: skip


def ladder() -> str:
    """docs/ladder.svg: the rungs from the mildest to the last."""
    parts = []
    for i, (fill, name, what, safeguards) in enumerate(RUNGS):
        y = 8 + 46 * i
        parts.append(box(8 + 14 * i, y, 92, 36, fill, name))
        parts.append(text(192, y + 15, what, 13, GREY, "start", 600))
        parts.append(text(192, y + 31, safeguards, 12, GREY, "start"))
        if i + 1 < len(RUNGS):
            parts.append(arrow((61 + 14 * i, y + 36), (61 + 14 * i, y + 45)))
    return picture(760, 290, "The ladder of safeguards: see, clip, skip, roll back, stop, resume", parts)


PICTURES = {"docs/block.svg": block, "docs/ladder.svg": ladder}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        write_atomically(ROOT / name, draw())
