"""Lays out texts in full beside or below an image: style, colors, wrapping, columns.

Boxes are (x0, y0, x1, y1) in pixels of the drawing, half-open.
"""

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .results import MASKED

# Okabe and Ito's palette, told apart with any color vision, in an order of strong contrasts.
PALETTE = (
    (0, 114, 178),  # blue
    (230, 159, 0),  # orange
    (0, 158, 115),  # bluish green
    (213, 94, 0),  # vermilion
    (86, 180, 233),  # sky blue
    (204, 121, 167),  # reddish purple
    (240, 228, 66),  # yellow
)
PAPER, INK, FAINT = (255, 255, 255), (16, 16, 20), (110, 110, 118)
BLANK = (214, 214, 220)  # a token that is still to come
NO_TEXT = "(nothing)"
# For fonts that lack typographers' marks, as the bundled one does.
LIKENESSES = dict(zip("‘’‚“”„–—−•·×", "'''\"\"\"---**x", strict=True))

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Style:
    """Sizes in pixels, all of them from the font's."""

    font: ImageFont.FreeTypeFont
    size: int

    @classmethod
    def fitting(cls, long_side: int, font: str | Path | None) -> "Style":
        """Legible beside an image whose long side has so many pixels."""
        size = max(18, round(long_side / 42))
        if font is None:
            return cls(ImageFont.load_default(size), size)
        return cls(ImageFont.truetype(str(font), size), size)

    @property
    def line(self) -> int:
        """From one baseline to the next."""
        return round(1.35 * self.size)

    @property
    def badge(self) -> int:
        """Side of a number's badge."""
        return round(1.45 * self.size)

    @property
    def gap(self) -> int:
        """Between things that belong together."""
        return round(0.6 * self.size)

    @property
    def margin(self) -> int:
        """Around a panel."""
        return round(0.9 * self.size)


@dataclass(frozen=True)
class Entry:
    """One text of a panel, numbered or not: where it stands and its wrapped lines of words, the
    first `quiet` of them in a fainter ink."""

    number: int | None
    lines: list[list[str]]
    box: Box
    text_left: int
    quiet: int = 0


def color_of(index: int) -> tuple[int, int, int]:
    """Color of region `index` (from 0)."""
    return PALETTE[index % len(PALETTE)]


def contrasting(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """White or ink, whichever has the higher contrast ratio on `color` (WCAG)."""
    on = _luminance(color)
    on_white, on_ink = 1.05 / (on + 0.05), (on + 0.05) / (_luminance(INK) + 0.05)
    return PAPER if on_white > on_ink else INK


def _luminance(color: tuple[int, int, int]) -> float:
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def badge_width(number: int, style: Style) -> int:
    """Width in pixels of the badge of `number`."""
    text = round(style.font.getlength(str(number)))
    return max(style.badge, text + round(0.8 * style.size))


def draw_badge(draw: ImageDraw.ImageDraw, box: Box, number: int, style: Style):
    """Draws a region's number on its color."""
    color = color_of(number - 1)
    edges = (box[0], box[1], box[2] - 1, box[3] - 1)
    line = max(1, style.size // 10)
    draw.rounded_rectangle(edges, style.badge // 3, color, PAPER, line)
    center = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    draw.text(center, str(number), contrasting(color), style.font, anchor="mm")


def answer_texts(questions: Sequence[str], answers: Sequence[str]) -> list[str]:
    """Panel texts of questions and answers: each question a line above its answer."""
    pairs = zip(one_line(questions), one_line(answers), strict=True)
    return [f"{question}\n{answer or NO_TEXT}" for question, answer in pairs]


def one_line(texts: Sequence[str]) -> list[str]:
    """Texts without line breaks."""
    return [" ".join(text.split()) for text in texts]


def add_panel(
    image: Image.Image, steps: list[list[str]], style: Style, *, numbered: bool
) -> list[Image.Image]:
    """Puts the texts of each step beside or below the image; one drawing for each step, all of
    one size, every text in the same place."""
    beside = image.width < 1.2 * image.height
    left = image.width if beside else 0
    top = 0 if beside else image.height
    width = _panel_width(image, steps, style, beside, numbered)
    columns = 1 if beside else columns_of(steps, width, image.height, style, numbered)
    layouts = lay_out(steps, (left, top), width, style, columns, numbered)
    height = max(entry.box[3] for entry in layouts[0]) + style.margin
    size = (left + width, max(image.height, height))

    frames = []
    for entries in layouts:
        frame = Image.new("RGB", size, PAPER)
        frame.paste(image, (0, 0))
        draw = ImageDraw.Draw(frame)
        for entry in entries:
            _draw_entry(draw, entry, style)
        frames.append(frame)
    return frames


def _panel_width(image, steps, style: Style, beside: bool, numbered: bool) -> int:
    if not beside:
        return max(image.width, 26 * style.size)
    width = max(round(0.7 * image.width), 22 * style.size)
    while width < max(1.3 * image.width, 34 * style.size):  # wider, sooner than a tall tail
        entries = lay_out(steps, (0, 0), width, style, 1, numbered)[0]
        if entries[-1].box[3] + style.margin <= image.height:
            break
        width += 2 * style.size
    return width


def columns_of(steps, width: int, height: int, style: Style, numbered: bool) -> int:
    """Columns of text below an image: lines of some sixty letters read best; shorter ones, when
    the text would be longer than the image."""
    count = len(steps[0])
    best = max(1, min(count, width // (30 * style.size)))
    most = max(best, min(count, width // (18 * style.size)))
    for columns in range(best, most):
        entries = lay_out(steps, (0, 0), width, style, columns, numbered)[0]
        if max(entry.box[3] for entry in entries) <= height:
            return columns
    return most


def lay_out(
    steps: list[list[str]],
    corner: tuple[int, int],
    width: int,
    style: Style,
    columns: int,
    numbered: bool,
) -> list[list[Entry]]:
    """Wraps every step's texts into entries; an entry has room for its longest text."""
    count = len(steps[0])
    indent = 0
    if numbered:
        indent = badge_width(count, style) + style.gap
    column = (width - 2 * style.margin - (columns - 1) * 2 * style.margin) // columns
    wrapped = [[wrap(text, column - indent, style) for text in texts] for texts in steps]

    # As tall as its longest text of any step, so that every step stands in the same place.
    lead = style.badge if numbered else style.line  # height of a first line
    heights = [
        lead + style.line * (max(len(lines[i]) for lines in wrapped) - 1) for i in range(count)
    ]

    boxes = []
    for k, (first, last) in enumerate(_columns(heights, columns, style.gap)):
        x = corner[0] + style.margin + k * (column + 2 * style.margin)
        y = corner[1] + style.margin
        for i in range(first, last):
            boxes.append((x, y, x + column, y + heights[i]))
            y += heights[i] + style.gap

    return [
        [
            Entry(
                i + 1 if numbered else None,
                lines[i],
                boxes[i],
                boxes[i][0] + indent,
                0 if numbered else len(wrap(texts[i].split("\n")[0], column, style)),
            )
            for i in range(count)
        ]
        for texts, lines in zip(steps, wrapped, strict=True)
    ]


def _columns(heights: list[int], columns: int, gap: int) -> list[tuple[int, int]]:
    """Splits entries, in order, into columns whose tallest is as short as can be."""

    def fill(limit: int) -> list[tuple[int, int]]:
        spans, first, height = [], 0, 0
        for i, own in enumerate(heights):
            if i > first and height + own > limit:
                spans.append((first, i))
                first, height = i, 0
            height += own + gap
        return [*spans, (first, len(heights))]

    low, high = max(heights), sum(heights) + gap * len(heights)
    while low < high:
        middle = (low + high) // 2
        if len(fill(middle)) <= columns:
            high = middle
        else:
            low = middle + 1
    return fill(low)


def wrap(text: str, width: int, style: Style) -> list[list[str]]:
    """Lines of words no wider than `width` pixels; a longer word is broken."""
    paragraphs = readable(text, style.font).split("\n")
    return [line for paragraph in paragraphs for line in _wrap_paragraph(paragraph, width, style)]


def _wrap_paragraph(text: str, width: int, style: Style) -> list[list[str]]:
    lines, used = [[]], 0.0
    space = style.font.getlength(" ")
    for word in text.split() or [NO_TEXT]:
        for piece in _pieces(word, width, style):
            own = word_width(piece, style)
            if lines[-1] and used + space + own > width:
                lines.append([])
                used = 0.0
            used += own + (space if lines[-1] else 0)
            lines[-1].append(piece)
    return lines


def readable(text: str, font: ImageFont.FreeTypeFont) -> str:
    """Returns the text in characters that the font has, as far as there are likenesses."""
    return "".join(c if c == MASKED or has_glyph(font, c) else _likeness(c) for c in text)


@functools.lru_cache(maxsize=4096)
def has_glyph(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Says whether a font draws a character as anything but the box for what it lacks."""
    if character.isspace():
        return True
    lacking = font.getmask("\uffff")
    drawn = font.getmask(character)
    return (drawn.size, bytes(drawn)) != (lacking.size, bytes(lacking))


def _likeness(character: str) -> str:
    if character in LIKENESSES:
        return LIKENESSES[character]
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return plain or character


def _pieces(word: str, width: int, style: Style) -> Iterator[str]:
    while word_width(word, style) > width and len(word) > 1:
        end = 1
        while end < len(word) - 1 and word_width(word[: end + 1], style) <= width:
            end += 1
        yield word[:end]
        word = word[end:]
    yield word


def word_width(word: str, style: Style) -> float:
    """Width in pixels of a word, or of the block that stands for a masked token."""
    return 0.9 * style.size if word == MASKED else style.font.getlength(word)


def _draw_entry(draw: ImageDraw.ImageDraw, entry: Entry, style: Style):
    left, top, _, _ = entry.box
    if entry.number is not None:
        width = badge_width(entry.number, style)
        right = entry.text_left - style.gap
        draw_badge(draw, (right - width, top, right, top + style.badge), entry.number, style)

    space = style.font.getlength(" ")
    # a badge's number and the first line share their middle
    middle = top + (style.badge if entry.number is not None else style.line) / 2
    for i, line in enumerate(entry.lines):
        quiet = i < entry.quiet or line == [NO_TEXT]
        x = float(entry.text_left)
        for word in line:
            own = word_width(word, style)
            if word == MASKED:
                half = 0.3 * style.size
                block = (x + 1, middle - half, x + own - 1, middle + half)
                draw.rounded_rectangle(block, style.size // 6, BLANK)
            else:
                ink = FAINT if quiet else INK
                draw.text((x, middle), word, ink, style.font, anchor="lm")
            x += own + space
        middle += style.line
