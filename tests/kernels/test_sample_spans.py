"""Span masks against a loop over rows in Python integers, and against their exact expectation."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKEND, INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_batches import BIG_ID, KEY, examples, layout
from kernel_oracles import spans_by_rate, spans_by_start

from slam_kernels import sample_spans

RAGGED = [0, 3, 25, 9, 10, 1, 70, 0, 11]


def expected_mask(lengths, ids, epochs, *, span, start_probability=None, rate=None):
    pieces = [torch.zeros(0, dtype=torch.bool)]
    for length, example, epoch in zip(lengths, ids.tolist(), epochs.tolist(), strict=True):
        if example == -1:
            mask = torch.zeros(length, dtype=torch.bool)
        elif rate is None:
            p = start_probability
            mask = torch.from_numpy(spans_by_start(length, example, epoch, key=KEY, span=span, probability=p))
        else:
            mask = torch.from_numpy(spans_by_rate(length, example, epoch, key=KEY, span=span, rate=rate))
        pieces.append(mask)
    return torch.cat(pieces)


def check(lengths, backend, ids=None, epochs=None, **options):
    if ids is None:
        ids, epochs = examples(len(lengths))
    mask = sample_spans(layout(lengths), ids, epochs, key=KEY, num_rows=sum(lengths), backend=backend, **options)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected_mask(lengths, ids, epochs, **options))
    return mask


@pytest.mark.parametrize("span", [1, 5, 10])
@pytest.mark.parametrize("probability", [0.0, 0.065, 0.5, 1.0])
def test_start_probability_equals_oracle(span, probability, backend):
    check(RAGGED, backend, span=span, start_probability=probability)


@pytest.mark.parametrize("span", [1, 5, 10])
@pytest.mark.parametrize("rate", [0.0, 0.15, 0.5, 1.0])
def test_budget_equals_oracle(span, rate, backend):
    mask = check(RAGGED, backend, span=span, rate=rate)
    if rate == 1.0 and span == 1:
        assert mask.all()


@settings(max_examples=7 if INTERPRETED else 30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    span=st.integers(1, 12),
    share=st.floats(0, 1),
    budget=st.booleans(),
    first=st.integers(-1, 2**40),
    epoch=st.integers(0, 2**32 - 1),
)
def test_any_shape(lengths, span, share, budget, first, epoch):

    ids = torch.arange(first, first + len(lengths))
    epochs = torch.full_like(ids, epoch)
    options = {"rate": share} if budget else {"start_probability": share}
    check(lengths, BACKEND, ids, epochs, span=span, **options)


@pytest.mark.parametrize("options", [{"start_probability": 0.5}, {"rate": 0.5}])
def test_example_minus_one_is_never_masked(options, backend):
    ids = torch.tensor([3, -1, 4])
    mask = check([30, 30, 30], backend, ids, torch.zeros(3, dtype=torch.int64), span=4, **options)
    assert mask[:30].any()
    assert not mask[30:60].any()
    assert mask[60:].any()


@pytest.mark.parametrize("options", [{"start_probability": 0.3}, {"rate": 0.4}])
def test_same_mask_in_any_batch(options, backend):
    def mask(lengths, ids, epochs):
        return sample_spans(
            layout(lengths),
            torch.tensor(ids),
            torch.tensor(epochs),
            key=KEY,
            span=5,
            num_rows=sum(lengths),
            backend=backend,
            **options,
        )

    alone = mask([40], [BIG_ID], [2])
    together = mask([13, 0, 40, 8], [1, 2, BIG_ID, -1], [0, 0, 2, 0])
    assert torch.equal(together[13:53], alone)
    assert not torch.equal(mask([40], [BIG_ID], [3]), alone)
    assert not torch.equal(mask([40], [BIG_ID + 2**32], [2]), alone)


def test_start_probability_has_the_expected_rate():
    # Row t is spared if none of the starts that cover it happened: (1 - p) ** (number of such starts).
    length, span, p, count = 60, 10, 0.065, 2000
    cu = layout([length] * count)
    mask = sample_spans(
        cu,
        torch.arange(count),
        torch.zeros(count, dtype=torch.int64),
        key=KEY,
        span=span,
        start_probability=p,
        num_rows=length * count,
    ).view(count, length)
    rows = torch.arange(length)
    covering = torch.minimum(rows, torch.tensor(length - span)) - (rows - span + 1).clamp(min=0) + 1
    exact = 1 - (1 - p) ** covering.double()
    deviation = (mask.double().mean(0) - exact).abs() / (exact * (1 - exact) / count).sqrt()
    assert float(deviation.max()) < 4.5
    assert float(exact.mean()) == pytest.approx(0.42, abs=0.02)


def test_budget_has_exactly_the_expected_rate_and_is_uniform():
    length, span, rate, count = 23, 5, 0.3, 4000
    cu = layout([length] * count)
    mask = sample_spans(
        cu,
        torch.arange(count),
        torch.zeros(count, dtype=torch.int64),
        key=KEY,
        span=span,
        rate=rate,
        num_rows=length * count,
    ).view(count, length)
    spans = mask.sum(1) / span
    assert set(spans.tolist()) <= {1.0, 2.0}
    mean = rate * length / span
    assert abs(float(spans.mean()) - mean) < 4.5 * ((mean % 1) * (1 - mean % 1) / count) ** 0.5
    single = mask[spans == 1].double()
    begins = torch.stack([single[:, b : b + span].all(1) for b in range(length - span + 1)], dim=1).double().mean(0)
    exact = 1 / (length - span + 1)
    assert float((begins - exact).abs().max()) < 4.5 * (exact / single.shape[0]) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of"),
        ({"rate": 0.1, "start_probability": 0.1}, "exactly one of"),
        ({"rate": 1.5}, "rate=1.5 must lie in"),
        ({"start_probability": -0.1}, "must lie in"),
        ({"rate": 0.5, "span": 0}, "span=0"),
        ({"rate": 0.5, "num_rows": 9}, "number of rows 9"),
        (
            {"rate": 0.5, "example_ids": torch.zeros(3, dtype=torch.int64)},
            "example_ids must be int64 of shape",
        ),
        ({"rate": 0.5, "epochs": torch.zeros(2)}, "epochs must be int64"),
    ],
)
def test_errors_name_what_is_wrong(options, message):
    zeros = torch.zeros(2, dtype=torch.int64)
    arguments = {"example_ids": zeros, "epochs": zeros, "key": 1, "span": 2, "num_rows": 10, **options}
    with pytest.raises(ValueError, match=message):
        sample_spans(layout([4, 6]), **arguments)
