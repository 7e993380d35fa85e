"""Span masks as a pure function of (key, epoch, example): no state, the same bits on any device and in any batch."""

from __future__ import annotations

import torch

from ..backend import use_triton
from ..checks import check_examples, check_layout, check_probability
from ..reference.sample_spans import sample_spans as _twin

_NAME = "sample_spans"


def sample_spans(
    cu_seqlens: torch.Tensor,
    example_ids: torch.Tensor,
    epochs: torch.Tensor,
    *,
    key: int,
    span: int,
    start_probability: float | None = None,
    rate: float | None = None,
    num_rows: int,
    backend: str = "torch",
) -> torch.Tensor:
    """Which rows to mask; no span leaves its sequence.

    With ``start_probability`` (wav2vec 2.0, w2v-BERT) every row that a whole span can start from starts one with that
    probability, and spans overlap: the masked share depends on the length. With ``rate`` (SpanBERT) a sequence of
    length L gets rate * L / s spans of s = min(span, L) rows, rounded up or down by chance to that expectation and at
    most L // s, placed without overlap, every placement equally likely.

    Args:
        cu_seqlens: *Shape:* ``(S + 1,)`` int32 from 0 to ``num_rows``.
        example_ids: *Shape:* ``(S,)`` int64; -1 masks nothing (a tail, or a sequence that is not to be masked).
        epochs: *Shape:* ``(S,)`` int64, the low 32 bits count.
        key: `stream_key` of the seed and this use.
        span: rows in a span, at least 1.
        start_probability, rate: exactly one of them, in [0, 1]; kept to 24 bits.
        num_rows: N.
        backend: ``torch`` or ``triton``.

    Returns:
        *Shape:* ``(N,)`` bool.
    """
    if (start_probability is None) == (rate is None):
        raise ValueError(f"{_NAME}: give exactly one of start_probability and rate, got {start_probability} and {rate}")
    if start_probability is not None:
        check_probability(_NAME, "start_probability", start_probability)
    if rate is not None:
        check_probability(_NAME, "rate", rate)
    if span < 1:
        raise ValueError(f"{_NAME}: span={span} must be at least 1")
    check_layout(_NAME, cu_seqlens, num_rows)
    check_examples(_NAME, cu_seqlens, example_ids, epochs)
    options = {"key": key, "span": span, "start_probability": start_probability, "rate": rate, "num_rows": num_rows}
    if use_triton(backend, cu_seqlens, _NAME):
        from ..fused.sample_spans import sample_spans as fused

        return fused(cu_seqlens, example_ids, epochs, **options)
    return _twin(cu_seqlens, example_ids, epochs, **options)
