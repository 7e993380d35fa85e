"""Runs a script of this project with NeMo's own normalisation in every Conformer layer. For ablations only.

    python benchmarks/with_norm.py group_norm scripts/speech_pretrain.py --config-name slam_stage1 model=tiny

group_norm, batch_norm: NeMo's ConformerConvolution on a batch of all sequences, padded to the longest, so that the
statistics count the padding, as NeMo's do. In pre-training that batch holds texts beside speech: more padding than
in NeMo's batches of one kind. A model that was trained so is fine-tuned, transcribed with and probed so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

NORMS = ("group_norm", "batch_norm")


def stock_convolution(norm: str) -> type[nn.Module]:
    """A class to put in the place of ``nemo_slam.modules.convolution.PackedConvolution``."""
    import numpy as np
    import torch
    from nemo.collections.asr.parts.submodules.conformer_modules import ConformerConvolution
    from torch import Tensor

    from nemo_slam.packing import SequenceLayout

    class StockConvolution(ConformerConvolution):
        def __init__(self, d_model: int, kernel_size: int, num_groups: int, eps: float, kernels: str):
            chosen = f"group_norm{num_groups}" if norm == "group_norm" else norm
            super().__init__(d_model=d_model, kernel_size=kernel_size, norm_type=chosen)
            if norm == "group_norm":
                self.batch_norm.eps = eps  # so that the statistics alone differ from PackedConvolution

        def forward(self, x: Tensor, pad_mask: SequenceLayout, cache: None = None) -> Tensor:
            """*Shape:* (1, N, D) -> (1, N, D); rows of the tail become 0."""
            lengths = pad_mask.lengths[:-1]
            lengths = lengths[lengths > 0]
            if not len(lengths):
                return torch.zeros_like(x)
            real = torch.as_tensor(np.arange(lengths.max()) < lengths[:, None]).to(x.device)
            padded = x.new_zeros(*real.shape, x.shape[-1])
            padded[real] = x[0, : pad_mask.num_valid]
            rows = super().forward(padded, pad_mask=~real)[real]
            return torch.cat([rows, rows.new_zeros(x.shape[1] - len(rows), x.shape[-1])]).unsqueeze(0)

    return StockConvolution


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("norm", choices=NORMS)
    parser.add_argument("script", help="of this project")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from nemo_slam import runner
    from nemo_slam.modules import conformer

    conformer.PackedConvolution = stock_convolution(options.norm)  # type: ignore[assignment, misc]
    return runner.main([options.script, *options.arguments])


if __name__ == "__main__":
    sys.exit(main())
