"""Computes the whole system again, plainly, from its description: what the tests compare with.

Nothing is shared with the package. It works in float64, by loops over pixels, patches, boxes and
positions, without a cache: every forward pass computes everything. Weights are a model's
`state_dict()`, shapes its config.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# Images: tiles and grids


def best_grid(width: int, height: int, side: int, most: int = 6) -> tuple[int, int]:
    """Returns the (columns, rows) nearest to the image's shape, of at most `most` tiles."""
    grids = []
    for tiles in range(1, most + 1):
        for columns in range(1, tiles + 1):
            if tiles % columns == 0:
                grids.append((columns, tiles // columns))
    best = None
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        if best is None or distance < best[0]:
            best = (distance, (columns, rows))
        elif distance == best[0] and width * height > 0.5 * side**2 * columns * rows:
            best = (distance, (columns, rows))
    return best[1]


def resize(image: Image.Image, width: int, height: int) -> np.ndarray:
    """Resizes bicubically, one axis first as Pillow 13 does, whichever Pillow there is."""
    if image.height > height and image.height - height > 2 * (image.width - width):
        sizes = [(image.width, height), (width, height)]
    else:
        sizes = [(width, image.height), (width, height)]
    for size in sizes:
        image = image.resize(size, Image.BICUBIC)
    return np.asarray(image)


def cut(image: Image.Image, grid: tuple[int, int], side: int) -> np.ndarray:
    """Cuts tiles, uint8 (T, side, side, 3), row by row; after several, a thumbnail."""
    columns, rows = grid
    whole = resize(image, columns * side, rows * side)
    tiles = []
    for row in range(rows):
        for column in range(columns):
            tiles.append(whole[row * side : (row + 1) * side, column * side : (column + 1) * side])
    if columns * rows > 1:
        tiles.append(resize(image, side, side))
    return np.stack(tiles)


def normalize(tiles: np.ndarray) -> torch.Tensor:
    """Maps uint8 (T, H, W, 3) to float64 (T, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(tiles.astype(np.float64) / 127.5 - 1).permute(0, 3, 1, 2)


# Images as LLaVA takes them ("anyres")


def best_canvas(width: int, height: int, side: int) -> tuple[int, int]:
    """Returns the (columns, rows) that show most of the image's pixels and waste least."""
    best = None
    for columns in range(1, 7):
        for rows in range(1, 7):
            scale = min(columns * side / width, rows * side / height)
            effective = min(int(width * scale) * int(height * scale), width * height)
            waste = columns * rows * side * side - effective
            if best is None or effective > best[0] or effective == best[0] and waste < best[1]:
                best = (effective, waste, (columns, rows))
    return best[2]


def cut_anyres(image: Image.Image, grid: tuple[int, int], side: int) -> np.ndarray:
    """Cuts tiles: the squeezed image, then the image fitted on black, tile by tile."""
    columns, rows = grid
    canvas = np.zeros((rows * side, columns * side, 3), np.uint8)
    wide, high = columns * side / image.width, rows * side / image.height
    if wide < high:
        width, height = columns * side, min(math.ceil(image.height * wide), rows * side)
    else:
        width, height = min(math.ceil(image.width * high), columns * side), rows * side
    y, x = (rows * side - height) // 2, (columns * side - width) // 2
    canvas[y : y + height, x : x + width] = resize(image, width, height)
    tiles = [resize(image, side, side)]
    for row in range(rows):
        for column in range(columns):
            tiles.append(canvas[row * side : (row + 1) * side, column * side : (column + 1) * side])
    return np.stack(tiles)


def anyres_tokens(network, image: Image.Image) -> torch.Tensor:
    """Computes the visual tokens of an image, its newlines included."""
    config = network.config
    side, unit = config.vision_config.image_size, config.cells_per_side
    columns, rows = best_canvas(*image.size, side)
    squeezed, *tiles = network.vision(normalize(cut_anyres(image, (columns, rows), side)))
    cells = [
        [
            tiles[y // unit * columns + x // unit][y % unit * unit + x % unit]
            for x in range(columns * unit)
        ]
        for y in range(rows * unit)
    ]
    if image.width / image.height > columns / rows:
        spare = (rows * unit - int(image.height * (columns * unit / image.width))) // 2
        cells = cells[spare : len(cells) - spare]
    else:
        spare = (columns * unit - int(image.width * (rows * unit / image.height))) // 2
        cells = [row[spare : len(row) - spare] for row in cells]
    h, w = len(cells), len(cells[0])
    times = math.sqrt(h * w / (config.anyres_max_tiles * unit**2))
    if times > 1.1:
        cells = shrink(cells, int(h // times), int(w // times))
    newline = network.weights["image_newline"]
    return torch.stack([*squeezed, *(token for row in cells for token in [*row, newline])])


def shrink(cells: list[list[torch.Tensor]], h: int, w: int) -> list[list[torch.Tensor]]:
    """Shrinks a map bilinearly; the centers of cells are at halves, the borders repeated."""
    grid = torch.stack([torch.stack(row) for row in cells])
    height, width = grid.shape[:2]

    def source(place, old, new):
        return max((place + 0.5) * old / new - 0.5, 0.0)

    return [
        [bilinear(grid, source(y, height, h), source(x, width, w), height, width) for x in range(w)]
        for y in range(h)
    ]


# Regions: a region mask is an array (H, W); its pixels are the non-zero ones


def numbering(masks: list[np.ndarray]) -> list[int]:
    """Returns the indices of the masks, largest area first, equals as given."""
    areas = [int((mask != 0).sum()) for mask in masks]
    order = []
    while len(order) < len(masks):
        left = [i for i in range(len(masks)) if i not in order]
        order.append(max(left, key=lambda i: (areas[i], -i)))
    return order


def members(mask: np.ndarray, number: int, grid, side: int, patch: int) -> np.ndarray:
    """Finds the patches of region `number`, bool (T, h, w), by way of an RGB image as released."""
    values = np.where(mask != 0, number, 255).astype(np.uint8)
    tiles = cut(Image.fromarray(np.stack([values] * 3, axis=-1)), grid, side)
    h = side // patch
    found = np.zeros((len(tiles), h, h), bool)
    for t in range(len(tiles)):
        for y in range(h):
            for x in range(h):
                normalized = tiles[t, y * patch, x * patch, 0] / 127.5 - 1
                found[t, y, x] = round((normalized + 1) * 127.5) != 255
    return found


def box(mask: np.ndarray, inclusive: bool) -> tuple[float, float, float, float]:
    """Returns the box of a mask, normalized xyxy; `inclusive` of the last row and column."""
    height, width = mask.shape
    rows = [y for y in range(height) if mask[y].any()]
    columns = [x for x in range(width) if mask[:, x].any()]
    end = 0 if inclusive else 1
    return (
        columns[0] / width,
        rows[0] / height,
        (columns[-1] + end) / width,
        (rows[-1] + end) / height,
    )


def roi_align(cells: torch.Tensor, corners, rows: int, columns: int) -> torch.Tensor:
    """Samples a map (h, w, D) in a box xyxy, in cells, by RoI-align: (rows * columns, D)."""
    h, w, _ = cells.shape
    x0, y0, x1, y1 = (float(c) - 0.5 for c in corners)
    out = []
    for row in range(rows):
        for column in range(columns):
            total = 0
            for i in (0.5, 1.5):
                for j in (0.5, 1.5):
                    y = y0 + (row + i / 2) * (y1 - y0) / rows
                    x = x0 + (column + j / 2) * (x1 - x0) / columns
                    total = total + bilinear(cells, y, x, h, w)
            out.append(total / 4)
    return torch.stack(out)


def bilinear(cells: torch.Tensor, y: float, x: float, h: int, w: int) -> torch.Tensor:
    """Interpolates a map (h, w, D) at a place; more than a cell outside it is zero."""
    if y < -1 or y > h or x < -1 or x > w:
        return torch.zeros_like(cells[0, 0])
    y, x = min(max(y, 0.0), h - 1), min(max(x, 0.0), w - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
    dy, dx = y - top, x - left
    upper = cells[top, left] * (1 - dx) + cells[top, right] * dx
    lower = cells[bottom, left] * (1 - dx) + cells[bottom, right] * dx
    return upper * (1 - dy) + lower * dy


# Network


class Network:
    """Runs the forward pass of a model's weights in float64."""

    def __init__(self, model):
        self.config = model.config
        self.suppressed = model.decoding_defaults["suppress_tokens"]
        self.weights = {k: v.double() for k, v in model.state_dict().items()}

    def linear(self, x, name):
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def layer_norm(self, x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x**2).mean(-1, keepdim=True) + self.config.vision_config.layer_norm_eps)
        return x * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def rms_norm(self, x, name):
        scale = torch.sqrt((x**2).mean(-1, keepdim=True) + self.config.text_config.rms_norm_eps)
        return x / scale * self.weights[name + ".weight"]

    def vision(self, pixels, prompts=None) -> torch.Tensor:
        """Returns features (T, tokens, D) after the connector; prompts (T, P, C) join patches."""
        config, merge = self.config.vision_config, self.config.spatial_merge_size
        p, n = config.patch_size, config.image_size // config.patch_size
        kernel = self.weights["vision_tower.embeddings.patch_embedding.weight"].flatten(1)
        patches = []
        for y in range(n):
            for x in range(n):
                window = pixels[:, :, y * p : (y + 1) * p, x * p : (x + 1) * p]
                patches.append(window.flatten(1) @ kernel.T)
        hidden = torch.stack(patches, 1)
        hidden = hidden + self.weights["vision_tower.embeddings.patch_embedding.bias"]
        if prompts is not None:
            hidden = hidden + prompts
        hidden = hidden + self.weights["vision_tower.embeddings.position_embedding.weight"]
        for i in range(config.num_hidden_layers):
            hidden = self.vision_layer(hidden, f"vision_tower.encoder.layers.{i}.")
        merged = []
        for y in range(0, n, merge):
            for x in range(0, n, merge):
                square = [(y + dy) * n + x + dx for dy in range(merge) for dx in range(merge)]
                merged.append(torch.cat([hidden[:, i] for i in square], -1))
        hidden = F.gelu(self.linear(torch.stack(merged, 1), "connector.linear_1"))
        return self.linear(hidden, "connector.linear_2")

    def vision_layer(self, hidden, name):
        heads = self.config.vision_config.num_attention_heads
        x = self.layer_norm(hidden, name + "layer_norm1")
        q, k, v = (self.linear(x, f"{name}self_attn.{c}_proj") for c in "qkv")
        out = torch.empty_like(q)
        width = q.shape[-1] // heads
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
            out[..., part] = scores.softmax(-1) @ v[..., part]
        hidden = hidden + self.linear(out, name + "self_attn.out_proj")
        x = self.linear(self.layer_norm(hidden, name + "layer_norm2"), name + "mlp.fc1")
        return hidden + self.linear(F.gelu(x, approximate="tanh"), name + "mlp.fc2")

    def embed(self, ids) -> torch.Tensor:
        return self.weights["language_model.model.embed_tokens.weight"][torch.as_tensor(ids)]

    def text(self, hidden, positions, allowed) -> torch.Tensor:
        """Returns logits (L, V) of embeddings (L, D), with `allowed` bool (L, L)."""
        config = self.config.text_config
        theta = config.rope_parameters["rope_theta"]
        half = config.head_dim // 2
        frequency = torch.tensor([theta ** (-2 * i / config.head_dim) for i in range(half)])
        angle = torch.as_tensor(positions).double()[:, None] * frequency.double()
        for i in range(config.num_hidden_layers):
            hidden = self.text_layer(hidden, angle, allowed, f"language_model.model.layers.{i}.")
        return self.linear(
            self.rms_norm(hidden, "language_model.model.norm"), "language_model.lm_head"
        )

    def text_layer(self, hidden, angle, allowed, name):
        config = self.config.text_config
        width = config.head_dim
        group = config.num_attention_heads // config.num_key_value_heads
        x = self.rms_norm(hidden, name + "input_layernorm")
        q, k, v = (self.linear(x, f"{name}self_attn.{c}_proj") for c in "qkv")
        heads = []
        for head in range(config.num_attention_heads):
            query = rotate(q[:, head * width : (head + 1) * width], angle)
            own = slice(head // group * width, (head // group + 1) * width)
            scores = query @ rotate(k[:, own], angle).T / math.sqrt(width)
            heads.append(scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v[:, own])
        hidden = hidden + self.linear(torch.cat(heads, -1), name + "self_attn.o_proj")
        x = self.rms_norm(hidden, name + "post_attention_layernorm")
        gate, up = self.linear(x, name + "mlp.gate_proj"), self.linear(x, name + "mlp.up_proj")
        return hidden + self.linear(gate * torch.sigmoid(gate) * up, name + "mlp.down_proj")


def rotate(x, angle):
    """Rotates the halves of each vector by angles: RoPE."""
    first, second = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


# Sequences


@dataclass
class Sequence:
    """One prompt with its responses: ids, positions, what may see what, and where things are."""

    ids: list[int]
    positions: list[int]
    allowed: torch.Tensor  # bool (L, L)
    images: list[int]  # columns of visual tokens
    replays: list[list[int]]  # columns of each region's RoI tokens
    answers: list[list[int]]  # columns of each caption's masks, or of the one answer


class Prompt:
    """Collects ids; every method returns the columns that its piece takes."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.ids = []

    def text(self, text):
        return self.token_ids(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def token(self, token, times=1):
        return self.token_ids([self.tokenizer.convert_tokens_to_ids(token)] * times)

    def token_ids(self, ids):
        start = len(self.ids)
        self.ids += ids
        return list(range(start, len(self.ids)))


SYSTEM = (
    "<|start_header_id|>system<|end_header_id|>\nYou are a helpful assistant.<|eot_id|>\n"
    "<|start_header_id|>user<|end_header_id|>\n<img>"
)
ASK = (
    "Describe each masked region in detail.<|eot_id|>\n"
    "<|start_header_id|>assistant<|end_header_id|>\n"
)


def released_sequence(
    tokenizer, visual: int, captions: list[list[int]], replay: int = 16
) -> Sequence:
    """Builds the released region prompt; `captions` are the ids of each slot (masks, or a text)."""
    prompt = Prompt(tokenizer)
    prompt.text(SYSTEM)
    images = prompt.token("<IMG_CONTEXT>", visual)
    prompt.text("</img>")
    replays = []
    for k in range(len(captions)):
        if k:
            prompt.text("\n")
        replays.append(prompt.token(f"<|reserved_token_{k}|>", replay))
    prompt.text("\n" + ASK)
    answers, blocks = [], []
    for k, caption in enumerate(captions):
        marker = prompt.token(f"<|Mask_Cap_{k}|>")
        answers.append(prompt.token_ids(caption))
        end = prompt.text("\n") if k + 1 < len(captions) else prompt.token("<|eot_id|>")
        blocks.append(marker + answers[-1] + end)
    allowed = draw_released(len(prompt.ids), replays, blocks)
    return Sequence(prompt.ids, list(range(len(prompt.ids))), allowed, images, replays, answers)


def draw_released(length: int, replays, blocks) -> torch.Tensor:
    """Draws the mask: everything sees everything, but a caption block only what is its own."""
    allowed = torch.ones(length, length, dtype=torch.bool)
    shared = [*range(replays[0][0]), *range(replays[-1][-1] + 1, blocks[0][0])]
    for replayed, block in zip(replays, blocks, strict=True):
        for query in block:
            allowed[query] = False
            for key in shared + replayed + block:
                allowed[query, key] = True
    return allowed


def independent_sequence(tokenizer, visual: int, number: int, caption: list[int], replay=16):
    """Builds one region's branch on its trunk: trunk, RoI tokens and marker, caption."""
    prompt = Prompt(tokenizer)
    prompt.text(SYSTEM)
    images = prompt.token("<IMG_CONTEXT>", visual)
    prompt.text("</img>\n" + ASK)
    trunk = len(prompt.ids)
    replays = prompt.token(f"<|reserved_token_{number}|>", replay)
    prompt.token(f"<|Mask_Cap_{number}|>")
    fixed = len(prompt.ids)
    answer = prompt.token_ids(caption)
    length = len(prompt.ids)
    allowed = torch.zeros(length, length, dtype=torch.bool)
    allowed[:trunk, :trunk] = True
    allowed[trunk:fixed, :fixed] = True
    allowed[fixed:] = True
    return Sequence(prompt.ids, list(range(length)), allowed, images, [replays], [answer])


def question_branch(
    tokenizer, visual: int, number: int, question: list, caption: list[int], replay=16
) -> tuple[Sequence, list[int]]:
    """Builds one region's branch with its own question: trunk, question, RoI tokens and marker.

    `question` is texts and the numbers of regions that stand between them. Returns also the number
    of the region whose RoI tokens stand in each of `replays`.
    """
    prompt = Prompt(tokenizer)
    prompt.text(SYSTEM)
    images = prompt.token("<IMG_CONTEXT>", visual)
    prompt.text("</img>")
    trunk, replays, named = len(prompt.ids), [], []
    prompt.text("\n")
    for part in question:
        if isinstance(part, str):
            prompt.text(part)
        else:
            replays.append(prompt.token(f"<|reserved_token_{part}|>", replay))
            named.append(part)
    prompt.text("<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>\n")
    replays.append(prompt.token(f"<|reserved_token_{number}|>", replay))
    named.append(number)
    prompt.token(f"<|Mask_Cap_{number}|>")
    fixed = len(prompt.ids)
    answer = prompt.token_ids(caption)
    length = len(prompt.ids)
    allowed = torch.zeros(length, length, dtype=torch.bool)
    allowed[:trunk, :trunk] = True
    allowed[trunk:fixed, :fixed] = True
    allowed[fixed:] = True
    sequence = Sequence(prompt.ids, list(range(length)), allowed, images, replays, [answer])
    return sequence, named


def chat_sequence(
    tokenizer, visual: list[int], question: str, answer: list[int], tree: bool = False
) -> Sequence:
    """Builds a question about images of `visual` tokens each.

    In a tree the prompt sees no answer, and nothing up to the last visual token sees what comes
    after it.
    """
    prompt = Prompt(tokenizer)
    prompt.text("<|start_header_id|>user<|end_header_id|>\n")
    images = []
    for tokens in visual:
        prompt.token("<img>")
        images += prompt.token("<IMG_CONTEXT>", tokens)
        prompt.text("</img>\n")
    prompt.text(question + "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n")
    answers = [prompt.token_ids(answer)]
    length = len(prompt.ids)
    allowed = torch.ones(length, length, dtype=torch.bool)
    if tree:
        allowed[: answers[0][0], answers[0][0] :] = False
        trunk = images[-1] + 1 if images else 0
        allowed[:trunk, trunk:] = False
    return Sequence(prompt.ids, list(range(length)), allowed, images, [], answers)


# An image with its regions, and the two tasks


class Regions:
    """Computes an image's visual and RoI tokens; `masks` are arrays in the order given."""

    def __init__(self, network: Network, image: Image.Image, masks: list[np.ndarray]):
        config = network.config
        side, patch = config.vision_config.image_size, config.vision_config.patch_size
        self.network = network
        self.grid = best_grid(*image.size, side)
        self.order = numbering(masks)
        self.patches = np.stack(
            [members(masks[i], k, self.grid, side, patch) for k, i in enumerate(self.order)], 1
        )
        released = config.roi_convention == "released"
        self.boxes = [box(masks[i], inclusive=released) for i in self.order]
        prompts = network.weights["region_prompts.weight"]
        T, P = self.patches.shape[0], (side // patch) ** 2
        added = torch.zeros(T, P, prompts.shape[1], dtype=torch.float64)
        for t in range(T):
            for k in range(len(masks)):
                for p in range(P):
                    if self.patches[t, k].reshape(-1)[p]:
                        added[t, p] += prompts[k]
        self.pixels = normalize(cut(image, self.grid, side))
        self.visual = network.vision(self.pixels, added)  # (T, tokens, D)
        self.replays = [self._replay(b, released) for b in self.boxes]

    def _replay(self, corners, released: bool) -> torch.Tensor:
        config = self.network.config
        columns, rows = self.grid
        tiles = self.visual[1:] if released and columns * rows > 1 else self.visual
        n = math.isqrt(tiles.shape[1])
        cells = torch.zeros(rows * n, columns * n, tiles.shape[2], dtype=torch.float64)
        for y in range(rows * n):
            for x in range(columns * n):
                cells[y, x] = tiles[y // n * columns + x // n, y % n * n + x % n]
        scale = 1 / config.roi_stride if released else 1
        width, height = columns * n * scale, rows * n * scale
        scaled = [corners[0] * width, corners[1] * height, corners[2] * width, corners[3] * height]
        return roi_align(cells, scaled, config.roi_output_size, config.roi_output_size)

    def sequence(self, tokenizer, captions: list[list[int]]) -> Sequence:
        visual = self.visual.shape[0] * self.visual.shape[1]
        return released_sequence(tokenizer, visual, captions, self.replays[0].shape[0])

    def branch(self, tokenizer, number: int, caption: list[int]) -> Sequence:
        visual = self.visual.shape[0] * self.visual.shape[1]
        replay = self.replays[0].shape[0]
        return independent_sequence(tokenizer, visual, number, caption, replay)

    def logits(self, sequence: Sequence, ids=None, replays=None) -> torch.Tensor:
        """Returns logits (L, V), with `ids` in place of the sequence's own."""
        hidden = self.network.embed(sequence.ids if ids is None else ids).clone()
        hidden[sequence.images] = self.visual.flatten(0, 1)
        for columns, tokens in zip(sequence.replays, replays or self.replays, strict=True):
            hidden[columns] = tokens
        return self.network.text(hidden, sequence.positions, sequence.allowed)


def caption_regions(regions: Regions, tokenizer, length: int, steps: int) -> list[list[int]]:
    """Captions all regions; returns the ids in the order in which the masks were given."""
    mask = regions.network.config.mask_token_id
    slot = [mask] * length
    count = len(regions.order)
    if regions.network.config.region_layout == "independent":
        numbered = []
        for k in range(count):
            branch = regions.branch(tokenizer, k, slot)
            numbered += joint_remasking(
                lambda ids, s=branch, k=k: regions.logits(s, ids, [regions.replays[k]]),
                branch,
                steps,
                mask,
            )
    else:
        sequence = regions.sequence(tokenizer, [slot] * count)
        numbered = joint_remasking(lambda ids: regions.logits(sequence, ids), sequence, steps, mask)
    captions = [None] * count
    for k, i in enumerate(regions.order):
        captions[i] = numbered[k]
    return captions


def joint_remasking(predict, sequence: Sequence, steps: int, mask: int) -> list[list[int]]:
    """Samples as released for regions: fills all positions, remasks the least confident of all."""
    ids = list(sequence.ids)
    columns = [c for answer in sequence.answers for c in answer]
    masked = set(columns)
    for step in range(steps):
        if not masked:
            break
        probabilities = predict(ids).softmax(-1)
        confidence = {c: float(probabilities[c].max()) for c in columns}
        for column in masked:
            ids[column] = int(probabilities[column].argmax())
        count = int(len(columns) * ((steps - 1 - step) / steps))
        masked = set(sorted(columns, key=lambda c: confidence[c])[:count])
        for column in masked:
            ids[column] = mask
    return [[ids[c] for c in answer] for answer in sequence.answers]


def visual_tokens(network: Network, images: list[Image.Image]) -> list[torch.Tensor]:
    """Computes the visual tokens of each image; of several, each is a single tile."""
    side, alone = network.config.vision_config.image_size, len(images) == 1
    tokens = []
    for image in images:
        if network.config.image_layout == "tiled":
            grid = best_grid(*image.size, side) if alone else (1, 1)
            tokens.append(network.vision(normalize(cut(image, grid, side))).flatten(0, 1))
        elif alone:
            tokens.append(anyres_tokens(network, image))
        else:
            longer = max(image.size)
            square = Image.new("RGB", (longer, longer), (127, 127, 127))
            square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
            (tile,) = network.vision(normalize(resize(square, side, side)[None]))
            tokens.append(torch.cat([tile, network.weights["image_newline"][None]]))
    return tokens


def answer_question(
    network: Network,
    tokenizer,
    images: list[Image.Image],
    question: str,
    *,
    length: int,
    steps: int,
    block: int,
    cfg: float = 0.0,
    tree: bool = False,
) -> list[int]:
    """Samples as released for questions: block by block, the most confident positions first."""
    visual = visual_tokens(network, images)
    mask = network.config.mask_token_id
    sequence = chat_sequence(tokenizer, [len(v) for v in visual], question, [mask] * length, tree)
    banned = network.suppressed
    columns = sequence.answers[0]

    def predict(ids, prompt_masked):
        hidden = network.embed(ids).clone()
        if visual:
            hidden[sequence.images] = torch.cat(visual)
        if prompt_masked:
            hidden[: columns[0]] = network.embed([mask])
        return network.text(hidden, sequence.positions, sequence.allowed)

    ids = list(sequence.ids)
    for first in range(0, length, block):
        masked = columns[first : first + block]
        each = steps // (length // block)
        for step in range(each):
            logits = predict(ids, False)
            if cfg:
                blank = predict(ids, True)
                logits = blank + (cfg + 1) * (logits - blank)
            logits[:, banned] = -math.inf
            probabilities = logits.softmax(-1)
            quota = block // each + (1 if step < block % each else 0)
            surest = sorted(masked, key=lambda c: -float(probabilities[c].max()))[:quota]
            for column in surest:
                ids[column] = int(probabilities[column].argmax())
            masked = [c for c in masked if c not in surest]
    return [ids[c] for c in columns]


def diffusion_loss(logits_of, ids, labels, t: float, noise, mask: int) -> float:
    """Returns LLaDA's loss of one sample; `logits_of(ids)` gives (L, V)."""
    p = (1 - 1e-3) * t + 1e-3
    targets = [i for i, label in enumerate(labels) if label != -100]
    masked = [i for i in targets if noise[i] < p]
    noisy = [mask if i in masked else token for i, token in enumerate(ids)]
    log_probabilities = logits_of(noisy).log_softmax(-1)
    return sum(-float(log_probabilities[i, labels[i]]) / p / len(targets) for i in masked)
