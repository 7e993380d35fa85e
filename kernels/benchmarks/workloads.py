"""What is timed: every operator in several implementations over several mixes of lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import counts
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slam_kernels import (
    apply_spans,
    corrupt_tokens,
    glu_conv_group_norm_silu,
    gumbel_noise,
    masked_cross_entropy,
    sample_distractors,
    sample_spans,
    span_contrastive,
)


@dataclass
class Workload:
    """One operator on one mix: implementation name -> a function that gives outputs to differentiate."""

    operator: str
    mix: str
    implementations: dict[str, Callable[[], Tensor]]
    inputs: list[Tensor]
    """What gradients are taken of; empty for an operator without a backward."""
    forward: counts.Counts
    backward: counts.Counts = ()
    others: dict[str, tuple[counts.Counts, counts.Counts]] = field(default_factory=dict)
    """Forward and backward of implementations that cannot but move more."""

    def limits(self, implementation: str, bytes_per_second: float) -> tuple[float, float]:
        """Seconds of forward and of both that an implementation cannot beat."""
        forward, backward = self.others.get(implementation, (self.forward, self.backward))
        return counts.seconds(forward, bytes_per_second), counts.seconds(forward + backward, bytes_per_second)


def mixes(tiny: bool) -> dict[str, list[int]]:
    """Lengths of the packed sequences."""
    if tiny:
        return {"uniform": [24] * 3, "ragged": [40, 7, 1, 0, 24]}
    generator = torch.Generator().manual_seed(0)
    speech = (torch.rand(48, generator=generator) * 600 + 50).int().tolist()
    text = (torch.rand(400, generator=generator) * 40 + 4).int().tolist()
    return {
        "B16 T1600": [1600] * 16,
        "speech 50-650": sorted(speech),
        "text 4-44": sorted(text),
        "speech, text, pairs": sorted(speech)[:24] + sorted(text)[:300] + [a + 30 for a in sorted(speech)[:16]],
    }


def layout(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def _padded(rows: Tensor, lengths: list[int]) -> Tensor:
    """(N, D) -> (B, D, T), zeros behind each sequence."""
    batch = nn.utils.rnn.pad_sequence(list(rows.split(lengths)), batch_first=True)
    return batch.transpose(1, 2).contiguous()


def _stock_middle(x: Tensor, p: dict[str, Tensor], groups: int) -> Tensor:
    """PyTorch's operators on a padded batch, as a Conformer has them; (B, 2 C, T) -> (B, C, T)."""
    h = F.glu(x, dim=1)
    h = F.conv1d(h, p["w"].unsqueeze(1), p["b"], padding=p["w"].shape[1] // 2, groups=h.shape[1])
    return F.silu(F.group_norm(h, groups, p["gamma"], p["beta"], 1e-3))


def convolution(lengths, mix, channels, groups, taps, dtype, device, kernels, compile) -> Workload:
    """The operator alone: packed by kernel and twin, padded by PyTorch's operators, both also compiled."""
    rows, cu = sum(lengths), layout(lengths, device)
    x = torch.randn(rows, 2 * channels, device=device, dtype=dtype, requires_grad=True)
    shapes = {"w": (channels, taps), "b": (channels,), "gamma": (channels,), "beta": (channels,)}
    p = {k: (torch.randn(s, device=device) * 0.3 + (k == "gamma")).requires_grad_() for k, s in shapes.items()}
    low = {k: t.detach().to(dtype).requires_grad_() for k, t in p.items()}
    batch = _padded(x.detach(), lengths).requires_grad_()

    def run(backend: str) -> Tensor:
        return glu_conv_group_norm_silu(
            x, p["w"], p["b"], p["gamma"], p["beta"], cu, num_groups=groups, eps=1e-3, backend=backend
        )

    implementations = {name: (lambda b=backend: run(b)) for name, backend in kernels.items()}
    implementations["stock padded"] = lambda: _stock_middle(batch, low, groups)
    if compile:
        compiled, stock = torch.compile(run), torch.compile(_stock_middle)
        implementations["twin compiled"] = lambda: compiled("torch")
        implementations["stock padded compiled"] = lambda: stock(batch, low, groups)
    forward, backward = counts.convolution(rows, channels, taps, x.element_size())
    inputs = [x, batch, *p.values(), *low.values()]
    padded = len(lengths) * max(lengths), channels, x.element_size()
    others = {}
    for name, is_compiled in (("stock padded", False), ("stock padded compiled", True)):
        first, second = counts.stock_convolution(*padded, is_compiled)
        others[name] = ((first,), (second,))
    return Workload("glu_conv_group_norm_silu", mix, implementations, inputs, (forward,), (backward,), others)


class PackedModule(nn.Module):
    """The whole convolution module on packed rows: projection, the operator, projection."""

    def __init__(self, channels: int, groups: int, taps: int):
        super().__init__()
        self.into, self.out = nn.Linear(channels, 2 * channels), nn.Linear(channels, channels)
        self.conv = nn.Conv1d(channels, channels, taps, groups=channels)
        self.norm = nn.GroupNorm(groups, channels, eps=1e-3)

    def forward(self, x: Tensor, cu: Tensor, backend: str) -> Tensor:
        parameters = self.conv.weight.squeeze(1), self.conv.bias, self.norm.weight, self.norm.bias
        y = glu_conv_group_norm_silu(
            self.into(x), *parameters, cu, num_groups=self.norm.num_groups, eps=self.norm.eps, backend=backend
        )
        return self.out(y)


def module(lengths, mix, channels, groups, taps, dtype, device, kernels, compile, nemo) -> Workload:
    """The whole module, and NeMo's own on the padded batch."""
    rows, cu = sum(lengths), layout(lengths, device)
    ours = PackedModule(channels, groups, taps).to(device, dtype)
    x = torch.randn(rows, channels, device=device, dtype=dtype, requires_grad=True)
    implementations = {name: (lambda b=backend: ours(x, cu, b)) for name, backend in kernels.items()}
    inputs = [x, *ours.parameters()]
    if compile:
        compiled = torch.compile(ours)
        implementations["twin compiled"] = lambda: compiled(x, cu, "torch")
    if nemo:
        from nemo.collections.asr.parts.submodules.conformer_modules import ConformerConvolution

        stock = ConformerConvolution(channels, taps, norm_type=f"group_norm{groups}").to(device, dtype)
        batch = _padded(x.detach(), lengths).transpose(1, 2).contiguous().requires_grad_()
        mask = torch.arange(max(lengths), device=device) >= torch.tensor(lengths, device=device)[:, None]
        implementations["NeMo padded"] = lambda: stock(batch, pad_mask=mask)
        inputs += [batch, *stock.parameters()]
        if compile:
            faster = torch.compile(stock)
            implementations["NeMo padded compiled"] = lambda: faster(batch, pad_mask=mask)
    middle = counts.convolution(rows, channels, taps, x.element_size())
    around = counts.pointwise(rows, channels, x.element_size())
    padded = len(lengths) * max(lengths), channels, x.element_size()
    others = {}
    for name, is_compiled in (("NeMo padded", False), ("NeMo padded compiled", True)):
        inner, outer = counts.stock_convolution(*padded, is_compiled), counts.pointwise(*padded)
        others[name] = ((inner[0], outer[0]), (inner[1], outer[1]))
    forward, backward = (middle[0], around[0]), (middle[1], around[1])
    return Workload("convolution module", mix, implementations, inputs, forward, backward, others)


def spans(lengths, mix, width, num, vocab, dtype, device, kernels) -> list[Workload]:
    """Samplers, masking and noise."""
    rows, cu = sum(lengths), layout(lengths, device)
    ids = torch.arange(len(lengths), device=device)
    epochs = torch.zeros_like(ids)
    mask = sample_spans(cu, ids, epochs, key=1, span=10, start_probability=0.065, num_rows=rows)
    x = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
    vector = torch.randn(width, device=device, dtype=dtype, requires_grad=True)
    tokens = torch.zeros(rows, dtype=torch.int64, device=device)
    _, index = apply_spans(x.detach(), mask, cu, ids, epochs, key=1, vector=None, std=0.1)
    masked, packed = index.numel(), (cu, ids, epochs)

    def each(function):
        return {name: (lambda b=backend: function(b)) for name, backend in kernels.items()}

    def start(b):
        return sample_spans(*packed, key=1, span=10, start_probability=0.065, num_rows=rows, backend=b)

    def budget(b):
        return sample_spans(*packed, key=1, span=5, rate=0.15, num_rows=rows, backend=b)

    def learned(b):
        return apply_spans(x, mask, *packed, key=1, vector=vector, std=0.1, backend=b)[0]

    def random(b):
        return apply_spans(x, mask, *packed, key=1, vector=None, std=0.1, backend=b)[0]

    def corrupt(b):
        return corrupt_tokens(tokens, mask, *packed, key=1, mask_id=4, vocab_size=vocab, backend=b)[0]

    def draw(b):
        return sample_distractors(index, *packed, key=1, num=num, backend=b)

    def gumbel(b):
        return gumbel_noise(index, *packed, key=1, num=1024, dtype=torch.float32, backend=b)

    forward, backward = counts.masking(rows, width, x.element_size())
    replaced = (forward,), (backward,)
    return [
        Workload("sample_spans (start)", mix, each(start), [], (counts.span_masks(rows),)),
        Workload("sample_spans (budget)", mix, each(budget), [], (counts.Count(2 * rows),)),
        Workload("apply_spans (learned)", mix, each(learned), [x, vector], *replaced),
        Workload("apply_spans (random)", mix, each(random), [x], *replaced),
        Workload("corrupt_tokens", mix, each(corrupt), [], (counts.corruption(rows),)),
        Workload("sample_distractors", mix, each(draw), [], (counts.noise(masked, num, 8),)),
        Workload("gumbel_noise", mix, each(gumbel), [], (counts.noise(masked, 1024, 4),)),
    ]


def contrastive(rows, width, num, dtype, device, kernels, gather: bool) -> Workload:
    """The loss; "gathered" is the usual way, with (M, K, D) in memory."""
    contexts, targets = (torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    drawn = torch.randint(0, rows - 1, (rows, num), device=device)
    drawn += drawn >= torch.arange(rows, device=device)[:, None]

    def run(backend: str) -> Tensor:
        return span_contrastive(contexts, targets, drawn, temperature=0.1, backend=backend)[0]

    def gathered() -> Tensor:
        candidates = torch.cat((targets.unsqueeze(1), targets[drawn]), dim=1)
        logits = F.cosine_similarity(contexts.unsqueeze(1), candidates, dim=-1).float() / 0.1
        return F.cross_entropy(logits, torch.zeros(rows, dtype=torch.int64, device=device), reduction="sum")

    implementations = {name: (lambda b=backend: run(b)) for name, backend in kernels.items()}
    if gather:
        implementations["gathered"] = gathered
    forward, backward = counts.contrastive(rows, width, num, contexts.element_size())
    mix = f"M{rows} D{width} K{num}"
    return Workload("span_contrastive", mix, implementations, [contexts, targets], (forward,), (backward,))


def entropy(rows, width, vocab, dtype, device, kernels, compile) -> Workload:
    """The cross entropy at half of the rows."""
    hidden = torch.randn(2 * rows, width, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab, width, device=device) * 0.03).to(dtype).requires_grad_()
    bias = torch.zeros(vocab, device=device, dtype=dtype, requires_grad=True)
    index = torch.arange(0, 2 * rows, 2, device=device)
    targets = torch.randint(0, vocab, (rows,), device=device)

    def run(backend: str) -> Tensor:
        return masked_cross_entropy(hidden, index, targets, weight, bias, backend=backend)[0]

    implementations = {name: (lambda b=backend: run(b)) for name, backend in kernels.items()}
    if compile:
        compiled = torch.compile(run)
        implementations["twin compiled"] = lambda: compiled("torch")
    forward, backward = counts.cross_entropy(rows, width, vocab, hidden.element_size())
    mix = f"M{rows} D{width} V{vocab}"
    return Workload("masked_cross_entropy", mix, implementations, [hidden, weight, bias], (forward,), (backward,))
