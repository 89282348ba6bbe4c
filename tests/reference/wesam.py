"""WeSAM's losses (arXiv:2312.03502) and BoxInst's (arXiv:2012.02310), written out by pixel."""

import math


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def cross_entropy(logit, target):
    p = sigmoid(logit)
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def focal(masks, targets, alpha):
    """Mean over all pixels of all instances."""
    values = []
    for mask, target in zip(masks, targets, strict=True):
        for row, wanted in zip(mask, target, strict=True):
            for logit, one in zip(row, wanted, strict=True):
                bce = cross_entropy(logit, one)
                values.append(alpha * (1 - math.exp(-bce)) ** 2 * bce)
    return sum(values) / len(values)


def unit(vector):
    length = math.sqrt(sum(v * v for v in vector))
    return [v / length for v in vector]


def pooled(embedding, mask):
    """Mean over a mask's pixels of the features [C][H][W], each of length 1; zeros if empty."""
    channels, height, width = len(embedding), len(mask), len(mask[0])
    total, count = [0.0] * channels, 0
    for i in range(height):
        for j in range(width):
            if mask[i][j]:
                pixel = unit([embedding[c][i][j] for c in range(channels)])
                total = [t + v for t, v in zip(total, pixel, strict=True)]
                count += 1
    return [t / max(count, 1) for t in total]


def contrastive(teacher, anchor, tau):
    def cosine(a, b):
        lengths = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
        return sum(v * w for v, w in zip(a, b, strict=True)) / lengths if lengths else 0.0

    same = sum(math.exp(cosine(f, g) / tau) for f, g in zip(teacher, anchor, strict=True))
    every = sum(math.exp(cosine(f, g) / tau) for f in teacher for g in anchor)
    return -math.log(same / every)


def projection(mask, box, smooth):
    """Both axes' dice of the largest probability, and of the box, in each row or column."""

    def dice(u, v):
        overlap = 2 * sum(a * b for a, b in zip(u, v, strict=True)) + smooth
        return 1 - overlap / (sum(a * a for a in u) + sum(b * b for b in v) + smooth)

    p = [[sigmoid(logit) for logit in row] for row in mask]
    b = [[float(one) for one in row] for row in box]
    rows = dice([max(row) for row in p], [max(row) for row in b])
    columns = dice([max(c) for c in zip(*p, strict=True)], [max(c) for c in zip(*b, strict=True)])
    return rows + columns


NEIGHBOURS = [(0, 1), (1, 0), (1, 1), (1, -1)]


def pairs(height, width, distance):
    """Yield each pair of neighbouring pixels once: which neighbour, here, there."""
    for number, (down, right) in enumerate(NEIGHBOURS):
        for y in range(height):
            for x in range(width):
                there = y + down * distance, x + right * distance
                if 0 <= there[0] < height and 0 <= there[1] < width:
                    yield number, (y, x), there


def alike(lab, distance):
    """Which pairs of the pixels lab[y][x] look alike: a set of (neighbour, y, x)."""
    found = set()
    for number, (y, x), (v, u) in pairs(len(lab), len(lab[0]), distance):
        if math.exp(-math.dist(lab[y][x], lab[v][u]) / 2) >= 0.3:
            found.add((number, y, x))
    return found


def pairwise(mask, affinity, region, distance):
    """Mean over the pairs that look alike and have a pixel in the region."""
    values = []
    for number, (y, x), (v, u) in pairs(len(mask), len(mask[0]), distance):
        if (number, y, x) in affinity and (region[y][x] or region[v][u]):
            p, q = sigmoid(mask[y][x]), sigmoid(mask[v][u])
            values.append(-math.log(p * q + (1 - p) * (1 - q)))
    return sum(values) / len(values) if values else 0.0
