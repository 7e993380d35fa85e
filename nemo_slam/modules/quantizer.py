"""The Gumbel-softmax quantizer that gives masked speech its targets (wav2vec 2.0, section 2; w2v-BERT, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

CODE_IDS = ("sampled", "likeliest")


@dataclass(frozen=True)
class GumbelQuantizerConfig:
    """Attributes:
    num_codes, code_dim: one codebook (w2v-BERT: 1024 entries of width 1024).
    temperature_start, temperature_end, temperature_decay: max(end, start * decay ** (steps_before + step)).
    steps_before: steps of earlier stages, so that the temperature goes on where they left it.
    logit_init_std: standard deviation of the logits at initialisation, for normalised input. The Gumbel noise has 1.3.
    code_ids: what masked prediction predicts (unknown in the papers): ``sampled``, the code that the noise chose, or
        ``likeliest``, the code without noise.
    """

    num_codes: int = 1024
    code_dim: int = 1024
    temperature_start: float = 2.0
    temperature_end: float = 0.1
    temperature_decay: float = 0.999995
    steps_before: int = 0
    logit_init_std: float = 5.0
    code_ids: str = "sampled"

    def __post_init__(self) -> None:
        if self.code_ids not in CODE_IDS:
            raise ValueError(f"code_ids: {self.code_ids!r} is not one of {', '.join(CODE_IDS)}")

    def temperature(self, step: int) -> float:
        """A function of the step, so that resuming needs no state."""
        return max(self.temperature_end, self.temperature_start * self.temperature_decay ** (self.steps_before + step))


@dataclass
class Quantized:
    """*Shape:* vectors (M, code_dim); sampled (M,) int64, the vectors' codes; code_ids (M,) int64, what to predict;
    probabilities (M, K) without Gumbel noise, fp32 or fp64."""

    vectors: Tensor
    sampled: Tensor
    code_ids: Tensor
    probabilities: Tensor


class GumbelQuantizer(nn.Module):
    """Chooses a code for each row by a hard Gumbel softmax; gradients pass straight through the soft one."""

    def __init__(self, config: GumbelQuantizerConfig, d_model: int):
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(d_model, elementwise_affine=False)
        self.logits = nn.Linear(d_model, config.num_codes)
        nn.init.normal_(self.logits.weight, std=config.logit_init_std * d_model**-0.5)
        nn.init.zeros_(self.logits.bias)
        self.codebook = nn.Parameter(torch.randn(config.num_codes, config.code_dim))

    def forward(self, rows: Tensor, noise: Tensor, step: int) -> Quantized:
        """Quantize unmasked features.

        Args:
            rows: (M, D) features.
            noise: (M, K) standard Gumbel noise; in validation as well, where it is a function of the example like all
                else.
            step: optimizer steps so far; sets the temperature.
        """
        logits = self.logits(self.norm(rows))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        scores = logits + noise
        sampled = scores.argmax(dim=-1)
        hard = torch.zeros_like(scores).scatter_(-1, sampled[:, None], 1.0)
        soft = (scores / self.config.temperature(step)).softmax(dim=-1)
        choice = hard + soft - soft.detach()
        code_ids = sampled if self.config.code_ids == "sampled" else logits.argmax(dim=-1)
        return Quantized(choice @ self.codebook.to(choice.dtype), sampled, code_ids, logits.softmax(dim=-1))


def perplexity(usage: Tensor) -> Tensor:
    """exp of the entropy of a distribution over codes (K,): how many codes are in use."""
    # The clamp keeps the gradient finite where a code is not used at all; 0 * log(tiny) is still 0.
    return torch.exp(-(usage * usage.clamp(min=torch.finfo(usage.dtype).tiny).log()).sum())
