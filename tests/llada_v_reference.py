"""Does again what LLaDA-V does with images, prompts and answers, from its description alone.

Nothing is shared with the package; the network itself is `reference.Network`. Loops over canvases,
cells and positions.
"""

import math

import numpy as np
import reference
import torch
from PIL import Image

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual"
    " content that the user provides, and assist the user with a variety of tasks using natural"
    " language."
)


# Images.


def best_canvas(width: int, height: int, side: int) -> tuple[int, int]:
    """Returns the tiles across and down."""
    best = None
    for i in range(1, 7):
        for j in range(1, 7):
            scale = min(i * side / width, j * side / height)
            pixels = min(math.floor(width * scale) * math.floor(height * scale), width * height)
            waste = i * side * j * side - pixels
            if best is None or pixels > best[0] or (pixels == best[0] and waste < best[1]):
                best = (pixels, waste, (i, j))
    return best[2]


def cut(image: Image.Image, canvas: tuple[int, int], side: int) -> np.ndarray:
    """Cuts tiles, uint8 (T, side, side, 3): the squeezed image, then the canvas row by row."""
    across, down = canvas
    scale_x, scale_y = across * side / image.width, down * side / image.height
    if scale_x < scale_y:
        width, height = across * side, min(math.ceil(image.height * scale_x), down * side)
    else:
        width, height = min(math.ceil(image.width * scale_y), across * side), down * side
    black = np.zeros((down * side, across * side, 3), np.uint8)
    left, top = (across * side - width) // 2, (down * side - height) // 2
    black[top : top + height, left : left + width] = reference.resize(image, width, height)
    tiles = [reference.resize(image, side, side)]
    for y in range(down):
        for x in range(across):
            tiles.append(black[y * side : (y + 1) * side, x * side : (x + 1) * side])
    return np.stack(tiles)


def cut_padded(image: Image.Image, side: int) -> np.ndarray:
    """Makes the only tile, uint8 (1, side, side, 3), of one of several images, on a gray square."""
    long = max(image.size)
    gray = np.full((long, long, 3), 127, np.uint8)
    left, top = (long - image.width) // 2, (long - image.height) // 2
    gray[top : top + image.height, left : left + image.width] = np.asarray(image)
    return reference.resize(Image.fromarray(gray), side, side)[None]


def rows_with_newlines(features, canvas, size, newline, most: int) -> torch.Tensor:
    """Joins the features (T, n * n, D) of an image's tiles to visual tokens.

    `size` is the image's width and height; its map may have the cells of `most` tiles.
    """
    across, down = canvas
    unit = math.isqrt(features.shape[1])
    cells = [
        [
            features[1 + y // unit * across + x // unit, y % unit * unit + x % unit]
            for x in range(across * unit)
        ]
        for y in range(down * unit)
    ]
    width, height = size
    if width / height > across / down:
        spare = (down * unit - int(height * (across * unit / width))) // 2
        cells = cells[spare : down * unit - spare]
    else:
        spare = (across * unit - int(width * (down * unit / height))) // 2
        cells = [row[spare : across * unit - spare] for row in cells]
    h, w = len(cells), len(cells[0]) if cells else 0
    t = math.sqrt(h * w / (most * unit**2))
    if t > 1.1:
        cells = shrink(cells, math.floor(h / t), math.floor(w / t))
    tokens = list(features[0])
    for row in cells:
        tokens += [*row, newline]
    return torch.stack(tokens)


def shrink(cells, rows: int, columns: int):
    """Resizes bilinearly, without anti-aliasing, between the centers of cells."""
    h, w = len(cells), len(cells[0])

    def places(count, length):
        for i in range(count):
            at = max((i + 0.5) * length / count - 0.5, 0)
            yield int(at), min(int(at) + 1, length - 1), at - int(at)

    out = []
    for y0, y1, dy in places(rows, h):
        row = []
        for x0, x1, dx in places(columns, w):
            upper = cells[y0][x0] * (1 - dx) + cells[y0][x1] * dx
            lower = cells[y1][x0] * (1 - dx) + cells[y1][x1] * dx
            row.append(upper * (1 - dy) + lower * dy)
        out.append(row)
    return out


def visual_tokens(network: reference.Network, images: list[Image.Image]) -> list[torch.Tensor]:
    """Returns the tokens that replace each image of one prompt."""
    side = network.config.vision_config.image_size
    newline = network.weights["image_newline"]
    if len(images) > 1:
        tiles = [reference.normalize(cut_padded(image, side)) for image in images]
        return [torch.cat([network.vision(tile)[0], newline[None]]) for tile in tiles]
    out = []
    for image in images:
        canvas = best_canvas(*image.size, side)
        features = network.vision(reference.normalize(cut(image, canvas, side)))
        most = network.config.anyres_max_tiles
        out.append(rows_with_newlines(features, canvas, image.size, newline, most))
    return out


# Prompts and answers.


def prompt_of(turns: list[tuple[str, str]]) -> str:
    """Renders a conversation of (role, text), up to the assistant's next words."""
    text = "<|startoftext|>"
    if turns[0][0] != "system":
        turns = [("system", SYSTEM), *turns]
    for role, content in turns:
        text += f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
    return text + "<|start_header_id|>assistant<|end_header_id|>\n\n"


class Conversation:
    """Predicts the logits of the answer to a rendered prompt with its images."""

    def __init__(self, network: reference.Network, tokenizer, text: str, images=()):
        self.network = network
        visual = visual_tokens(network, list(images))
        chunks = text.split("<image>")
        assert len(chunks) == len(visual) + 1
        parts, self.ids = [], []
        for i, chunk in enumerate(chunks):
            ids = tokenizer(chunk, add_special_tokens=False)["input_ids"]
            ids = ids[1:] if i else ids  # the newline after an image is lost
            parts.append(network.embed(torch.tensor(ids, dtype=torch.int64)))
            self.ids += ids
            if i < len(visual):
                parts.append(visual[i])
                self.ids += [None] * len(visual[i])
        self.prompt = torch.cat(parts)

    def logits(self, answer: list[int]) -> torch.Tensor:
        """Returns logits (len(answer), V)."""
        hidden = torch.cat([self.prompt, self.network.embed(torch.tensor(answer))])
        length = len(hidden)
        everything = torch.ones(length, length, dtype=torch.bool)
        return self.network.text(hidden, range(length), everything)[len(self.prompt) :]


def answer(predict, length, steps, block, *, mask, suppressed, stops) -> tuple[list[int], int]:
    """Samples as LLaDA-V does, where a position is masked that holds the mask token.

    `predict(ids)` gives logits (length, V). Returns the ids, and where the first stop stands
    (`length` where there is none).
    """
    ids, stop = [mask] * length, length
    for first in range(0, length, block):
        if stop <= first:
            break
        each = steps // (length // block)
        for step in range(each):
            found = stop < length
            masked = [i for i in range(stop if found else first + block) if ids[i] == mask]
            if (found and not masked) or mask not in ids[first : first + block]:
                break
            logits = predict(ids)
            logits[:, suppressed] = -math.inf
            probabilities = logits.softmax(-1)
            quota = block // each + (1 if step < block % each else 0)
            for i in sorted(masked, key=lambda i: -float(probabilities[i].max()))[:quota]:
                ids[i] = int(probabilities[i].argmax())
            for text in stops:
                for i in range(length - len(text) + 1):
                    if ids[i : i + len(text)] == text:
                        stop = min(stop, i)
    return ids, stop
