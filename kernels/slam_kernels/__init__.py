"""The operators of nemo_slam: tensors in, tensors out, no NeMo.

Every operator takes packed rows: sequences lie end to end along the first axis and ``cu_seqlens`` (int32) says where
each begins. ``operators/`` holds the public functions, ``reference/`` their PyTorch twins, ``fused/`` the Triton
kernels, which are imported only when an operator is called with ``backend="triton"``.
"""

from .backend import BackendError, resolve, triton_unavailable
from .operators.apply_spans import apply_spans
from .operators.corrupt_tokens import corrupt_tokens
from .operators.glu_conv_group_norm_silu import glu_conv_group_norm_silu
from .operators.gumbel_noise import gumbel_noise
from .operators.masked_cross_entropy import masked_cross_entropy
from .operators.sample_distractors import sample_distractors
from .operators.sample_spans import sample_spans
from .operators.span_contrastive import span_contrastive
from .reference.philox import philox, stream_key

__all__ = [
    "BackendError",
    "apply_spans",
    "corrupt_tokens",
    "glu_conv_group_norm_silu",
    "gumbel_noise",
    "masked_cross_entropy",
    "philox",
    "resolve",
    "sample_distractors",
    "sample_spans",
    "span_contrastive",
    "stream_key",
    "triton_unavailable",
]
