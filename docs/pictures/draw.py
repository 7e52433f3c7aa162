"""Draws the pictures of README.md and docs/ as SVG files beside this one.

    python docs/pictures/draw.py                      writes headline.svg, layout.svg and graphs.svg here
    python docs/pictures/draw.py --folder F --png     writes them to F, and a PNG of each on a light and on a dark page

Needs matplotlib (pip install "akvq_fx[figures]"). Every number comes from numbers.json, which says where it was
measured. Each picture has a light panel of its own, so that it reads the same on a light and on a dark page. The same
version of matplotlib draws the same bytes; tests/test_pictures.py checks that the stored files are what this script
draws.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

HERE = Path(__file__).parent
INK, SMALL, LINE, PANEL = "#1f2328", "#59636e", "#d0d7de", "#f6f8fa"
OURS, OTHER, PLAIN = "#0969da", "#bf8700", "#8c959f"  # akvq, the best-known alternative, the 16-bit cache
VISION, TEXT, PIVOT, RECENT = "#c8d1da", "#8ecbff", "#ffb77c", "#a6e3b0"
GREEN, PACKED = "#1a7f37", "#ddf4ff"
PAGES = {"light": "#ffffff", "dark": "#0d1117"}
SETTINGS = {"svg.hashsalt": "akvq_fx", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9}


class Numbers:
    """numbers.json by name: `value` and `error` as numbers, `shown` as the table has them."""

    def __init__(self, path: Path = HERE / "numbers.json"):
        self.stored = json.loads(path.read_text(encoding="utf-8"))["numbers"]

    def value(self, name: str) -> float:
        return float(self.stored[name]["value"])

    def error(self, name: str) -> float:
        return float(self.stored[name].get("error", 0))

    def shown(self, name: str) -> str:
        return self.stored[name]["value"]


class Sheet:
    """A figure with one axes over all of it: x to the right and y down, 100 units an inch, and a panel behind."""

    def __init__(self, title: str, width: float, height: float):
        self.title, self.figure = title, Figure(figsize=(width / 100, height / 100))
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")
        self.box(2, 2, width - 4, height - 4, PANEL, LINE, radius=10)

    def box(self, x, y, width, height, color, edge="none", text="", radius=0.0, size=9.0, mono=False, weight="normal"):
        """A rectangle with its top left corner at (x, y), and words in its middle."""
        style = dict(facecolor=color, edgecolor=edge, linewidth=1)
        if radius:
            shape = FancyBboxPatch((x, y), width, height, boxstyle=f"round,pad=0,rounding_size={radius}", **style)
        else:
            shape = Rectangle((x, y), width, height, **style)
        self.axes.add_patch(shape)
        if text:
            self.write(x + width / 2, y + height / 2, text, size, align="center", middle=True, mono=mono, weight=weight)

    def write(self, x, y, text, size=9.0, color=INK, align="left", middle=False, mono=False, weight="normal"):
        """Words whose top, or with middle=True whose middle, is at y. Returns the x at which they end."""
        lines, height = text.split("\n"), 1.85 * size  # a size is in points, 1.39 units each
        y += -height * (len(lines) - 1) / 2 if middle else 1.3 * size
        style = dict(fontsize=size, color=color, ha=align, va="center_baseline" if middle else "baseline")
        style |= dict(family="DejaVu Sans Mono" if mono else "DejaVu Sans", fontweight=weight)
        drawn = [self.axes.text(x, y + height * i, line, **style) for i, line in enumerate(lines)]
        inverse = self.axes.transData.inverted()
        return max(words.get_window_extent().transformed(inverse).x1 for words in drawn)

    def arrow(self, start, end, color=SMALL, both=False):
        style = dict(arrowstyle="<|-|>" if both else "-|>", mutation_scale=9, shrinkA=0, shrinkB=0)
        self.axes.add_patch(FancyArrowPatch(start, end, linewidth=1.2, color=color, **style))

    def line(self, points, color=SMALL, width=1.2):
        self.axes.plot([x for x, _ in points], [y for _, y in points], color=color, lw=width, solid_capstyle="butt")

    def save(self, folder: Path, name: str, png: bool = False) -> None:
        about = {"Date": None, "Title": self.title}  # matplotlib adds its version as the creator
        self.figure.savefig(folder / f"{name}.svg", metadata=about, transparent=True)
        for page, color in PAGES.items() if png else ():
            self.figure.savefig(folder / f"{name}-{page}.png", dpi=150, facecolor=color)


def bars(sheet: Sheet, x, y, width, rows) -> None:
    """Horizontal bars from zero, to one scale, the longest `width` wide. rows: (name, color, value or None, label)."""
    longest = max(value for _, _, value, _ in rows if value is not None)
    for name, color, value, label in rows:
        weight = "bold" if color == OURS else "normal"
        sheet.write(x, y, name, 9, INK if color == OURS else SMALL, weight=weight)
        if value is None:
            sheet.write(x, y + 25, label, 9, SMALL, middle=True)
        else:
            length = value / longest * width
            sheet.box(x, y + 17, length, 16, color)
            sheet.write(x + length + 7, y + 25, label, 10, INK, middle=True, weight="bold")
        y += 43


def headline(numbers: Numbers) -> Sheet:
    """Cache bytes, tokens a second at equal memory, accuracy: the 16-bit cache, the best-known alternative, akvq."""
    n, shown, error = numbers.value, numbers.shown, numbers.error
    sheet = Sheet("akvq_fx: cache size, speed at equal memory and accuracy", 900, 318)
    percent = lambda name: (
        f"{100 * n(name):.1f} ± {100 * error(name):.1f} %" if error(name) else f"{100 * n(name):.0f} %"
    )
    whole = lambda name: f"{n(name):,.0f}"
    groups = (
        (
            f"Cache: {n('bits_none') / n('bits_akvq'):.1f}× smaller",
            "bits per cached number, with all overheads",
            190,
            (
                ("16-bit cache (transformers)", PLAIN, n("bits_none"), f"{n('bits_none'):.0f}"),
                ("KIVI, 2 bits (simulated)", OTHER, n("bits_kivi"), shown("bits_kivi")),
                ("akvq, 2 bits", OURS, n("bits_akvq"), shown("bits_akvq")),
            ),
            "Small trained LLaVA, 14 images, as\na 16-bit model stores it.\n"
            "KIVI: what a real cache would take. At\n4,096 tokens of LLaVA-1.5-7B akvq has\n"
            f"{n('share_text'):.2f} of the 16-bit bytes",
        ),
        (
            f"Speed: {n('speed_akvq') / n('speed_static'):.1f}× in equal memory",
            "tokens a second, with all rows that fit",
            190,
            (
                (f"16-bit StaticCache, {shown('rows_static')} rows", PLAIN, n("speed_static"), whole("speed_static")),
                ("hqq, 2 bits (QuantizedCache)", OTHER, None, "not measured in this memory"),
                (f"akvq, 2 bits, {shown('rows_akvq')} rows", OURS, n("speed_akvq"), whole("speed_akvq")),
            ),
            "LLaVA-1.5-7B's decoder, 24 GB of an H100,\n512 tokens in, 128 out, both compiled.\n"
            f"Another run, batch 40: 16-bit {whole('speed40_static')},\nhqq {whole('speed40_hqq')} (not compiled),"
            f" akvq {whole('speed40_akvq')}\n(window of 128)",
        ),
        (
            f"Accuracy: {100 * n('right_akvq'):.1f} % right",
            "answers to questions about images",
            140,
            (
                ("16-bit cache (transformers)", PLAIN, n("right_none"), percent("right_none")),
                ("KIVI, 2 bits (simulated)", OTHER, n("right_kivi"), percent("right_kivi")),
                ("akvq, 2 bits", OURS, n("right_akvq"), percent("right_akvq")),
            ),
            f"The same model, float16, 11 tasks of {shown('questions_none')}\n(16-bit), "
            f"{shown('questions_kivi')} (KIVI) and {shown('questions_akvq')} (akvq) questions.\n"
            "Text, SmolLM2-135M, loss added:\n"
            f"{n('loss_kivi'):.3f} ± {error('loss_kivi'):.3f} (KIVI),\n"
            f"{n('loss_akvq'):.3f} ± {error('loss_akvq'):.3f} (akvq) nats a token",
        ),
    )  # fmt: skip
    for x, (title, unit, width, rows, conditions) in zip((24, 322, 620), groups, strict=True):
        sheet.write(x, 16, title, 12, weight="bold")
        sheet.write(x, 40, unit, 8.5, SMALL)
        bars(sheet, x, 68, width, rows)
        sheet.write(x, 212, conditions, 8.5, SMALL)
    sheet.line([(24, 202), (876, 202)], LINE)
    return sheet


# the prompt of the layout's drawing: 22 tokens, two images among text, with a window of 6
TOKENS, WINDOW = 22, 6
PIVOTS = (0, 6)
IMAGES = (range(3, 9), range(11, 17))


def layout(numbers: Numbers) -> Sheet:
    """Keys of one layer: a body where slot = position, and the overlays that hold some of its tokens better."""
    shown = numbers.shown
    sheet = Sheet("The packed cache: a 2-bit body with overlays for the tokens that matter", 900, 450)
    cell, left = 28, 256
    place = lambda slot: left + slot * cell
    vision = {at for image in IMAGES for at in image}
    recent = range(TOKENS - WINDOW, TOKENS)
    color_of = lambda at: PIVOT if at in PIVOTS else VISION if at in vision else TEXT
    texts = [at for at in range(TOKENS) if color_of(at) == TEXT]

    def row(y, height, name, about, slots):
        """slots: (position or None, color, whether it is read here), from slot 0 on."""
        sheet.write(24, y + height / 2 - 9, name, 10, middle=True, weight="bold")
        sheet.write(24, y + height / 2 + 9, about, 8.5, SMALL, middle=True)
        for slot, (at, color, read) in enumerate(slots):
            words = "" if at is None else str(at)
            sheet.box(place(slot) + 1, y, cell - 3, height, color if read else PANEL, color, words, size=8)

    def beside(slots, y, words):
        sheet.write(place(slots) + 10, y, words, 8.5, SMALL, middle=True)

    row(28, 24, "the tokens", "their classes: one byte each", [(at, color_of(at), True) for at in range(TOKENS)])
    for image in IMAGES:
        sheet.write((place(image[0]) + place(image[-1] + 1)) / 2, 58, "image", 8.5, SMALL, align="center")
    first, last = place(recent[0]) + 1, place(TOKENS) - 2
    sheet.line([(first, 57), (first, 62), (last, 62), (last, 57)], GREEN, 1.6)
    sheet.write((first + last) / 2, 64, "most recent", 8.5, GREEN, align="center")
    body = [(at, color_of(at), at not in PIVOTS and at not in recent) for at in range(TOKENS)]
    row(106, 16, f"body, {shown('body_bits')} bits", "every token; slot = position", body)
    for at in range(TOKENS):
        sheet.box(place(at) + 1, 128, cell - 3, 5, LINE)
    sheet.write(
        left, 138, "and of each token a scale and a minimum. Outlined: read from an overlay instead", 8.5, SMALL
    )

    y = 188
    row(y, 38, "pivots, 16 bits", f"{shown('pivots')} tokens of large activation",
        [*((at, PIVOT, True) for at in PIVOTS), (None, LINE, False)])  # fmt: skip
    beside(3, y + 19, "with their positions; -1 in a free slot")
    y = 262
    row(y, 16, f"text, {shown('text_bits')} bits", "keys of text among images", [(at, TEXT, True) for at in texts])
    beside(len(texts), y + 8, "the lower two bits of the code, and the position;\nthe upper two stand in the body")
    y = 316
    row(y, 38, "window, 16 bits", f"the last {shown('window')} tokens",
        [(at, RECENT, True) for at in sorted(recent, key=lambda at: at % WINDOW)])  # fmt: skip
    beside(WINDOW, y + 19, f"a ring: slot = position mod window ({WINDOW} in this drawing);\n"
           "a token that leaves it is in the body already")  # fmt: skip

    sheet.line([(24, 384), (876, 384)], LINE)
    x = 24
    for color, words in ((TEXT, "text"), (VISION, "vision"), (PIVOT, "pivot"), (RECENT, "recent, of any class")):
        sheet.box(x, 402, 16, 16, color)
        x = sheet.write(x + 22, 410, words, 8.5, SMALL, middle=True) + 18
    sheet.write(
        876, 410, "keys of one layer; a centre and a gain for each of their channels", 8.5, SMALL, "right", True
    )
    return sheet


def graphs(numbers: Numbers) -> Sheet:
    """What happens: the prompt's graph, PackedKV in the user's cache, the decode graph; then that before and after."""
    sheet = Sheet("What happens to a model: prompt graph, packed cache, decode graph", 900, 566)
    sheet.write(24, 16, "What happens when a compiled model generates", 12, weight="bold")
    for x, title, words, color in (
        (24, "prompt graph", "attends to its own 16-bit\nkeys and values as before,\nand packs them", "#ffffff"),
        (345, "the user's cache", "DynamicCache, StaticCache\nor a tuple; it keeps PackedKV\nas it would keep a tensor",
         PACKED),
        (666, "decode graph", "appends a token to the codes\nand attends to them,\nonce for every new token",
         "#ffffff"),
    ):  # fmt: skip
        sheet.box(x, 48, 210, 96, color, LINE, radius=6)
        sheet.write(x + 105, 56, title, 10, align="center", weight="bold")
        sheet.write(x + 105, 78, words, 9, SMALL, align="center")
    sheet.arrow((234, 96), (345, 96))
    sheet.write(289, 74, "akvq::pack", 8.5, align="center", mono=True)
    sheet.write(289, 101, "PackedKV", 8.5, SMALL, align="center")
    sheet.arrow((555, 96), (666, 96), both=True)
    sheet.write(610, 74, "its buffers", 8.5, SMALL, align="center")
    sheet.write(610, 101, "read, and\nwritten in place", 8.5, SMALL, align="center")

    sheet.line([(24, 166), (876, 166)], LINE)
    sheet.line([(450, 180), (450, 542)], LINE)
    before = ("A decode graph around its cache: before", ("past k", "past v"), VISION, "cat",
              "scaled_dot_product_attention", "both are returned,\nas the new cache",
              "reads 16 bits a number\nof every token")  # fmt: skip
    after = ("and after", ("codes k", "codes v"), PACKED, "akvq::append", "akvq::attend",
             "nothing is returned:\nwritten in place", "reads 2 bits a number,\nand the overlays")  # fmt: skip
    wide, step = 72, 82
    for left, (title, cache, color, write, attend, returned, reads) in ((24, before), (474, after)):
        middle = lambda column, left=left: left + column * step + wide / 2

        def node(center, y, words, width=wide, height=28, fill="#ffffff"):
            sheet.box(center - width / 2, y, width, height, fill, LINE, words, radius=5, size=8.5, mono=True)

        sheet.write(left, 180, title, 12, weight="bold")
        for column, words in enumerate(("rope(q)", cache[0], "rope(k)", "v", cache[1])):
            node(middle(column), 216, words, fill=color if words in cache else "#ffffff")
        both = write != "cat"  # append reads and writes its buffers
        for kept, new in ((1, 2), (4, 3)):
            center = (middle(kept) + middle(new)) / 2
            for column in (kept, new):
                end = center + (24 if middle(column) > center else -24)
                sheet.arrow((middle(column), 244), (end, 288), both=both and column == kept)
            node(center, 288, write, 112, fill=PACKED if both else "#ffffff")
            sheet.arrow((center, 316), (center, 376))
        sheet.write((middle(1) + middle(4)) / 2, 338, returned, 8.5, SMALL, "center")
        sheet.arrow((middle(0), 244), (middle(0), 376))
        span = left + 4 * step + wide - left
        node(left + span / 2, 376, attend, span, fill=PACKED if both else "#ffffff")
        sheet.arrow((left + span / 2, 404), (left + span / 2, 452))
        sheet.write(left + span / 2 + 12, 410, reads, 8.5, SMALL)
        node(left + span / 2, 452, "o_proj")
    words = "append rotates, quantizes and packs the new token.\nattend rotates the query, reads codes and overlays and"
    sheet.write(474, 496, words + "\nrotates its output back. All else stays as it is.", 8.5, SMALL)
    words = "The cache after a step is the one before it and\none token more, at 16 bits a number."
    sheet.write(24, 496, words, 8.5, SMALL)
    return sheet


PICTURES = {"headline": headline, "layout": layout, "graphs": graphs}


def draw(folder: Path, png: bool = False) -> None:
    """Write every picture into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = Numbers()
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS}):
        for name, picture in PICTURES.items():
            picture(numbers).save(folder, name, png)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE)
    parser.add_argument("--png", action="store_true")
    arguments = parser.parse_args()
    draw(arguments.folder, arguments.png)


if __name__ == "__main__":
    main()
