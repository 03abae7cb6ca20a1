"""Merges small pieces of an image step by step into larger ones, and keeps the whole tree of it.

     root          the image
     /  \\
    n    n         each node is a region: it is born when its two parts merge, at a level that
   / \\  / \\        says how unlike they are, and dies when it merges with a neighbor. What stands
  leaves, pieces   out is unlike its neighbors: it lives long.
"""

import heapq

import numpy as np

BINS = 12  # of each channel's histogram
NEAR_GRAY = 6.0  # units of Lab's a and b in a bin around gray, where photographs have them
# What makes two neighbors unlike: mean color, histogram, and the edge along their border.
COLOR, HISTOGRAM, EDGE = 1.0, 1.0, 1.5
COLOR_SCALE = np.array([0.6, 1.6, 1.6]) / 50  # of Lab as 8-bit values; light varies by itself
MAX_EDGE = 1.5
SIZE_POWER = 0.25  # the smaller of two merges earlier, else specks live longest


class RegionTree:
    """The tree of merges of an image's pieces.

    Nodes are numbered: first the pieces, in the order of their labels, then merges as they come,
    the root last.

    Attributes:
        pieces: int (H, W), the label of each pixel's piece.
        parts: for each merge its two parts.
        parent: int (nodes,), of the root itself.
        area: int (nodes,), pixels.
        birth, death: float (nodes,), levels, never falling towards the root.
    """

    def __init__(self, pieces: np.ndarray, lab: np.ndarray, edges: np.ndarray):
        """Merges `pieces` (H, W) by colors (H, W, 3), 8-bit Lab, and edge strengths (H, W)."""
        self.pieces = pieces
        self.num_pieces = int(pieces.max()) + 1
        merging = _Merging(pieces, lab, edges)
        self.parts = merging.run()

        count = self.num_pieces + len(self.parts)
        self.parent = np.full(count, count - 1)
        self.area = np.array(merging.areas, dtype=int)
        self.birth, self.death = np.zeros(count), np.full(count, merging.level)
        for node, (parts, level) in enumerate(
            zip(self.parts, merging.levels, strict=True), self.num_pieces
        ):
            self.parent[list(parts)] = node
            self.death[list(parts)] = self.birth[node] = level

    def __len__(self) -> int:
        return len(self.parent)

    def mask(self, node: int) -> np.ndarray:
        """Returns the pixels of a node, bool (H, W)."""
        inside = np.zeros(self.num_pieces, bool)
        ahead = [node]
        while ahead:
            each = ahead.pop()
            if each < self.num_pieces:
                inside[each] = True
            else:
                ahead += self.parts[each - self.num_pieces]
        return inside[self.pieces]

    def path(self, column: int, row: int) -> list[int]:
        """Returns the nodes that a pixel is in, from its piece to the root."""
        nodes = [int(self.pieces[row, column])]
        while self.parent[nodes[-1]] != nodes[-1]:
            nodes.append(int(self.parent[nodes[-1]]))
        return nodes

    def life(self, num_regions: int) -> np.ndarray:
        """Returns how long nodes live, as logarithms of levels.

        Only levels count at which at most `num_regions` are left.
        """
        if not self.parts:
            return np.zeros(len(self))
        births = np.sort(self.birth[self.num_pieces :])
        floor = max(births[-min(num_regions, len(births))], 1e-6)
        return np.log(np.maximum(self.death, floor) / np.maximum(self.birth, floor))

    def best_cut(self, worth: np.ndarray) -> list[int]:
        """Chooses nodes of which none is in another, with the highest sum of their worth (nodes,).

        Nodes that are worth nothing are left out.
        """
        best = worth.copy()
        for node, (left, right) in enumerate(self.parts, self.num_pieces):
            best[node] = max(worth[node], best[left] + best[right])

        chosen, ahead = [], [len(self) - 1]
        while ahead:
            node = ahead.pop()
            if worth[node] > 0 and worth[node] >= best[node]:
                chosen.append(node)
            elif node >= self.num_pieces:
                ahead += self.parts[node - self.num_pieces]
        return chosen


class _Merging:
    """Merges the two neighbors that are most alike, until one region is left."""

    def __init__(self, pieces: np.ndarray, lab: np.ndarray, edges: np.ndarray):
        features = _features(pieces, lab)
        self.areas = features[:, 0].tolist()
        self.features = dict(enumerate(features))  # sums over the pixels, of who is left
        self.borders = _borders(pieces, edges)  # {region: {neighbor: sum and count of edges}}
        self.total = pieces.size
        self.level = 0.0
        self.levels: list[float] = []

    def run(self) -> list[tuple[int, int]]:
        """Returns the merges in their order."""
        merges = []
        pairs = [(a, b) for a, others in self.borders.items() for b in others if a < b]
        heap = [(self._unlikeness(a, b), a, b) for a, b in pairs]
        heapq.heapify(heap)

        while heap:
            level, a, b = heapq.heappop(heap)
            if a not in self.features or b not in self.features:
                continue  # one of them is part of a larger region by now
            self.level = max(self.level, level)
            self.levels.append(self.level)
            merges.append((a, b))

            merged = self._merge(a, b)
            for other in self.borders[merged]:
                heapq.heappush(heap, (self._unlikeness(merged, other), other, merged))
        return merges

    def _merge(self, a: int, b: int) -> int:
        merged = len(self.areas)
        self.features[merged] = self.features.pop(a) + self.features.pop(b)
        self.areas.append(self.areas[a] + self.areas[b])

        own: dict[int, np.ndarray] = {}
        for part in (a, b):
            for other, border in self.borders.pop(part).items():
                if other not in (a, b):
                    own[other] = own[other] + border if other in own else border
                    del self.borders[other][part]
        for other, border in own.items():
            self.borders[other][merged] = border
        self.borders[merged] = own
        return merged

    def _unlikeness(self, a: int, b: int) -> float:
        one, other = self.features[a], self.features[b]
        small = one[0] * other[0] / (one[0] + other[0]) / self.total
        difference = np.abs(one / one[0] - other / other[0])
        color = np.linalg.norm(difference[1:4] * COLOR_SCALE)
        histogram = difference[4:].sum() / 6  # 0: equal, 1: nothing in common
        edge_sum, edge_count = self.borders[a][b]
        edge = min(edge_sum / edge_count, MAX_EDGE)
        return float((COLOR * color + HISTOGRAM * histogram + EDGE * edge) * small**SIZE_POWER)


def _features(pieces: np.ndarray, lab: np.ndarray) -> np.ndarray:
    """Returns sums over the pixels of each piece: their number, colors and histograms."""
    labels, count = pieces.ravel(), int(pieces.max()) + 1
    colors = lab.reshape(-1, 3).astype(float)
    bins = (colors - [0, 128, 128]) / [256 / BINS, NEAR_GRAY, NEAR_GRAY] + [0, BINS / 2, BINS / 2]
    bins = np.clip(bins.astype(int), 0, BINS - 1)

    columns = [np.bincount(labels, minlength=count)]
    columns += [np.bincount(labels, colors[:, c], minlength=count) for c in range(3)]
    for c in range(3):
        cells = np.bincount(labels * BINS + bins[:, c], minlength=count * BINS)
        columns += list(cells.reshape(count, BINS).T)
    return np.stack(columns, axis=1).astype(float)


def _borders(pieces: np.ndarray, edges: np.ndarray) -> dict[int, dict[int, np.ndarray]]:
    """Returns, of each pair of neighbors, the sum of edge strengths along their border and its
    length."""
    count = int(pieces.max()) + 1
    codes, strengths = [], []
    for one, other in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        a, b = pieces[one], pieces[other]
        crossing = a != b
        codes.append((np.minimum(a, b) * count + np.maximum(a, b))[crossing])
        strengths.append(np.maximum(edges[one], edges[other])[crossing])

    found, index = np.unique(np.concatenate(codes), return_inverse=True)
    sums = np.bincount(index, np.concatenate(strengths), minlength=len(found))
    lengths = np.bincount(index, minlength=len(found))
    borders: dict[int, dict[int, np.ndarray]] = {piece: {} for piece in range(count)}
    for code, border in zip(found.tolist(), np.stack([sums, lengths], 1), strict=True):
        a, b = divmod(code, count)
        borders[a][b] = borders[b][a] = border
    return borders
