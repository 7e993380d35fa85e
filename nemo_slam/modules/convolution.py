"""The Conformer's convolution module over packed rows, with GroupNorm over each sequence's own rows."""

from __future__ import annotations

import torch.nn.functional as F
from nemo.collections.asr.parts.submodules.conformer_modules import ConformerConvolution
from torch import Tensor, nn

from nemo_slam.modules import fp8
from nemo_slam.packing import SequenceLayout
from slam_kernels import backend as kernel_backend
from slam_kernels import glu_conv_group_norm_silu


class PackedConvolution(ConformerConvolution):
    """NeMo's ``ConformerConvolution`` with group normalisation, on rows (1, N, D).

    Parameters and their names are NeMo's (its GroupNorm is called ``batch_norm``). NeMo's statistics count padding,
    so an utterance's output depends on its neighbours in the batch; these are taken over the sequence's own rows
    (method:
    "groups").

    Args:
        num_groups, eps: of the GroupNorm; SLAM's norm in place of BatchNorm, 32 groups and 1e-3 as in Lingvo.
        kernels: ``auto``, ``torch`` or ``triton``; looked at in forward, since a model may be moved.
    """

    def __init__(self, d_model: int, kernel_size: int, num_groups: int, eps: float, kernels: str):
        super().__init__(d_model=d_model, kernel_size=kernel_size, norm_type=f"group_norm{num_groups}")
        self.batch_norm.eps = eps
        self.kernels = kernels
        self.products: dict[str, fp8.Linear] = {}

    def use_fp8(self) -> None:
        """Run the two pointwise products in FP8."""
        width = self.d_model
        self.products = {"pointwise_conv1": fp8.Linear(width, 2 * width), "pointwise_conv2": fp8.Linear(width, width)}

    def _pointwise(self, name: str, rows: Tensor) -> Tensor:
        convolution: nn.Conv1d = getattr(self, name)
        product = self.products.get(name, F.linear)
        return product(rows, convolution.weight.squeeze(-1), convolution.bias)

    def forward(self, x: Tensor, pad_mask: SequenceLayout, cache: None = None) -> Tensor:
        """*Shape:* (1, N, D) -> (1, N, D); ``pad_mask`` is the layout, where NeMo's layer passes a mask."""
        rows = self._pointwise("pointwise_conv1", x.squeeze(0))
        rows = glu_conv_group_norm_silu(
            rows,
            self.depthwise_conv.weight.squeeze(1),
            self.depthwise_conv.bias,
            self.batch_norm.weight,
            self.batch_norm.bias,
            pad_mask.cu_seqlens,
            num_groups=self.batch_norm.num_groups,
            eps=self.batch_norm.eps,
            backend=kernel_backend.resolve(self.kernels, rows.device),
        )
        return self._pointwise("pointwise_conv2", rows).unsqueeze(0)
