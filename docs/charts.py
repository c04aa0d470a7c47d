"""Charts of the committed figures, drawn when the site is built: `{{ chart NAME }}` on a page.

Numbers come from the tables in README.md and benchmarks/README.md, so that a chart and its table
cannot differ. Colours are the site's own, by CSS variables: one drawing serves light and dark.
"""

import io
import pathlib
import re

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).parents[1]
# Drawn in these colours, which then become the site's.
INK, SOFT, GREY = "#010101", "#020202", "#030303"
BLUE, LIGHT, ORANGE = "#040404", "#050505", "#060606"
VARIABLES = {
    INK: "ink", SOFT: "soft", GREY: "grey", BLUE: "blue", LIGHT: "light", ORANGE: "orange",
}  # fmt: skip
STYLE = {
    "svg.fonttype": "none", "font.size": 10, "text.color": INK, "axes.edgecolor": SOFT,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9.5,
    "svg.hashsalt": "mla_jax",
}  # fmt: skip


def table(file: str, header: str) -> list[list[str]]:
    """The rows of the table in a Markdown file whose header line begins so."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def number(cell: str) -> float:
    """The first number of a cell."""
    return float(re.search(r"[\d,]*\.?\d+", cell)[0].replace(",", ""))


def decode():
    """The attention core of one decoding step: ours, FlashMLA, XLA, and the floor."""
    rows = table("README.md", "| B, S, N, T |")
    fig, ax = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
    for y, row in enumerate(reversed(rows)):
        kernel, flash, xla, floor = map(number, row[1:5])
        ax.plot([kernel * floor, xla], [y, y], color=GREY, lw=0.6, zorder=1)
        ax.plot(kernel * floor, y, "|", color=INK, ms=11, mew=1.6)
        ax.plot(xla, y, "o", color=GREY, ms=6)
        ax.plot(flash, y, "o", color=ORANGE, ms=6)
        ax.plot(kernel, y, "o", color=BLUE, ms=6)
    names = []
    for shape, *_ in reversed(rows):
        batch, slots, heads, tokens = shape.split(", ")
        more = "" if tokens == "1" else f", {tokens} tokens"
        names.append(f"{batch} x {slots}, {heads} heads{more}")
    ax.set_yticks(range(len(rows)), names)
    ax.set(xscale="log", xlabel="microseconds")
    ticks = [10, 30, 100, 300, 1000, 3000, 10000]
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.minorticks_off()
    for mark, color, name in (("o", BLUE, "mla_jax"), ("o", ORANGE, "FlashMLA"),
                              ("o", GREY, "XLA"), ("|", INK, "floor")):  # fmt: skip
        ax.plot([], [], mark, color=color, label=name, ms=6 if mark == "o" else 11, mew=1.6)
    fig.legend(loc="outside upper left", ncols=4, handletextpad=0.2, columnspacing=1.2)
    return fig


def step():
    """Where a whole decoder's step goes, by batch."""
    rows = table("benchmarks/README.md", "| | batch 1 | its bytes |")
    colors = [BLUE, LIGHT, ORANGE, INK, GREY, SOFT]
    fig, ax = plt.subplots(figsize=(6.4, 2.6), layout="constrained")
    left = [0.0, 0.0, 0.0]
    for (name, *cells), color in zip(rows[:6], colors, strict=True):
        taken = [number(cells[column]) for column in (0, 2, 4)]
        short = "router, norms, head, other" if name.startswith("router") else name
        ax.barh(range(3), taken, left=left, color=color, height=0.62, label=short)
        left = [sum(pair) for pair in zip(left, taken, strict=True)]
    for y, end in enumerate(left):
        whole, floor = (number(rows[-1][2 * y + column]) for column in (1, 2))
        ax.plot([floor, floor], [y - 0.42, y + 0.42], color=INK, lw=1.6)
        ax.text(end + 0.15, y, f"{whole:.1f} ms", va="center")
    ax.set_yticks(range(3), ["batch 1", "batch 8", "batch 64"])
    ax.set(xlabel="milliseconds of one step; the line is what its bytes take", xlim=(0, 15.5))
    ax.invert_yaxis()
    fig.legend(loc="outside upper left", ncols=3, handlelength=1, columnspacing=1)
    return fig


def attention():
    """The expanded form's kernels beside cuDNN."""
    rows = [row for row in table("benchmarks/README.md", "| | ours forward | cuDNN |")
            if row[2] and row[4]]  # fmt: skip
    fig, ax = plt.subplots(figsize=(6.4, 2.9), layout="constrained")
    for y, (_, ours, theirs, both, theirs_both) in enumerate(rows):
        for offset, color, mine, other in ((-0.2, BLUE, ours, theirs),
                                           (0.2, LIGHT, both, theirs_both)):  # fmt: skip
            ratio = number(mine) / number(other)
            ax.barh(y + offset, ratio, 0.36, color=color)
            ax.text(max(ratio, 1) + 0.02, y + offset, f"{ratio:.2f}", va="center", fontsize=9)
    ax.axvline(1, color=ORANGE, lw=1.4)
    ax.set_yticks(range(len(rows)), [row[0] for row in rows])
    ax.set(xlabel="time, cuDNN's is 1", xlim=(0, 1.2))
    ax.invert_yaxis()
    ax.bar(0, 0, color=BLUE, label="forward")
    ax.bar(0, 0, color=LIGHT, label="forward and backward")
    ax.plot([], [], color=ORANGE, lw=1.4, label="cuDNN")
    fig.legend(loc="outside upper left", ncols=3, handlelength=1, columnspacing=1)
    return fig


CHARTS = {"decode": decode, "step": step, "attention": attention}


def svg(name: str) -> str:
    """A chart as an SVG element for a page."""
    with plt.rc_context(STYLE):
        fig = CHARTS[name]()
        out = io.StringIO()
        fig.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        plt.close(fig)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for drawn, variable in VARIABLES.items():
        text = text.replace(drawn, f"var(--mla-{variable})")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px sans-serif", text)
    text = re.sub(r"id=\"(\w+)\"", rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#(\w+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r"href=\"#(\w+)\"", rf'href="#{name}-\1"', text)
    description = CHARTS[name].__doc__.strip()
    return text.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)


def on_page_content(html, **kwargs):
    """Puts the charts where the page names them."""
    figure = '<figure class="mla-figure">{}</figure>'
    return re.sub(r"<p>{{ chart (\w+) }}</p>", lambda found: figure.format(svg(found[1])), html)
