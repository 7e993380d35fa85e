"""Independent references: NumPy and float64, one sequence and one row at a time. Nothing here imports slam_kernels."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F


def philox4x32(key: int, c0: int, c1: int, c2: int, c3: int) -> list[int]:
    """Philox4x32-10 in Python integers, after Salmon et al. (2011)."""
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    c = [int(x) & 0xFFFFFFFF for x in (c0, c1, c2, c3)]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def words_of(key: int, c0: int, example: int, epoch: int) -> list[int]:
    """The four words of a counter of an example; numbers of 64 bits are cut as two's complement."""
    return philox4x32(key, c0, example & 0xFFFFFFFF, (example >> 32) & 0xFFFFFFFF, epoch)


def word_at(key: int, row: int, column: int, columns: int, example: int, epoch: int) -> int:
    """The word of (row, column) where a row has ``columns`` of them."""
    return words_of(key, row * -(-columns // 4) + column // 4, example, epoch)[column % 4]


def spans_by_start(length: int, example: int, epoch: int, *, key: int, span: int, probability: float) -> np.ndarray:
    """The mask of one sequence, start probability with overlap."""
    mask = np.zeros(length, dtype=bool)
    for t in range(0, length - span + 1):
        if words_of(key, t, example, epoch)[0] >> 8 < round(probability * 2**24):
            mask[t : t + span] = True
    return mask


def spans_by_rate(length: int, example: int, epoch: int, *, key: int, span: int, rate: float) -> np.ndarray:
    """The mask of one sequence, fixed budget of spans that do not overlap."""
    mask = np.zeros(length, dtype=bool)
    if length == 0:
        return mask
    s = min(span, length)
    exact = round(rate * 2**24) * length  # times 2**-24 / s: the expected number of spans
    count, rest = divmod(exact, s << 24)
    if (words_of(key, 0xFFFFFFFF, example, epoch)[0] >> 8) * s < rest:
        count += 1
    count = min(count, length // s)
    slots = length - count * (s - 1)
    ranked = sorted(range(slots), key=lambda j: (words_of(key, j, example, epoch)[0], j))
    for i, j in enumerate(sorted(ranked[:count])):
        begin = j + i * (s - 1)
        assert not mask[begin : begin + s].any()
        mask[begin : begin + s] = True
    return mask


def gaussian_at(key: int, row: int, column: int, columns: int, example: int, epoch: int) -> float:
    """Box-Muller in float64 from the same words."""
    even = column - column % 2
    first, second = (word_at(key, row, even + i, columns + columns % 2, example, epoch) for i in (0, 1))
    radius = math.sqrt(-2.0 * math.log((2 * (first >> 9) + 1) / 2**24))
    angle = 2 * math.pi * (second >> 8) / 2**24
    return radius * (math.sin(angle) if column % 2 else math.cos(angle))


def gumbel_at(key: int, row: int, column: int, columns: int, example: int, epoch: int) -> float:
    """Gumbel noise in float64 from the same word."""
    word = word_at(key, row, column, columns, example, epoch)
    return -math.log(-math.log((2 * (word >> 9) + 1) / 2**24))


def convolution_middle(x, conv_weight, conv_bias, norm_weight, norm_bias, cu_seqlens, num_groups, eps):
    """Stock torch in float64, one sequence at a time: glu, conv1d, group_norm, silu. Gradients by autograd."""
    up = [None if t is None else t.double() for t in (conv_weight, conv_bias, norm_weight, norm_bias)]
    pieces = [x.new_zeros(0, x.shape[1] // 2, dtype=torch.float64)]
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        if begin == end:
            continue
        h = F.glu(x[begin:end].double(), dim=-1).t().unsqueeze(0)
        h = F.conv1d(h, up[0].unsqueeze(1), up[1], padding=conv_weight.shape[1] // 2, groups=h.shape[1])
        if h.shape[2] * (h.shape[1] // num_groups) == 1:
            # group_norm refuses a group of one value, which is its own mean.
            h = (h - h) * up[2][:, None] + up[3][:, None]
        else:
            h = F.group_norm(h, num_groups, up[2], up[3], eps)
        pieces.append(F.silu(h).squeeze(0).t())
    return torch.cat(pieces)


def contrastive(contexts, targets, distractors, temperature):
    """Float64, a row at a time."""
    c = contexts.double()
    t = targets.double()
    total = c.sum() * 0 + t.sum() * 0
    correct = []
    for m in range(c.shape[0]):
        drawn = distractors[m][distractors[m] >= 0]
        if drawn.numel() == 0:
            correct.append(False)
            continue
        rows = torch.cat((t[m : m + 1], t[drawn]))
        similarity = F.cosine_similarity(c[m : m + 1], rows, dim=1)
        total = total - F.log_softmax(similarity / temperature, dim=0)[0]
        correct.append(bool((similarity[0] > similarity[1:]).all()))
    return total, torch.tensor(correct, dtype=torch.bool)
