"""The planner's count of what the convolution module's PyTorch twin moves, against every operator that it runs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_slam.planning.operations import PRECISIONS, Tally
from slam_kernels import glu_conv_group_norm_silu

LENGTHS, CHANNELS, GROUPS = (700, 900), 32, 2
WRITTEN_ONLY = ("index_copy_", "new_zeros", "zeros_like")
"""Operators that do not read their first tensor: they write into it, or make one of its shape."""
ALLOCATIONS = ("empty", "empty_like", "new_empty")


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write. Half a float32 (N, C) is counted, less is not: (N, G), (C,), places."""

    def __init__(self, unit):
        super().__init__()
        self.unit, self.moved = unit, 0.0

    def count(self, value):
        for tensor in tree_leaves(value):
            if isinstance(tensor, torch.Tensor):
                held = min(tensor.nbytes, tensor.untyped_storage().nbytes())  # a broadcast one is read once
                self.moved += round(2 * held / self.unit) / 2

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema, name = func._schema, func.overloadpacket.__name__
        if name in ALLOCATIONS or any(out.alias_info and not out.alias_info.is_write for out in schema.returns):
            return result  # nothing is moved: memory is given out, or seen in another shape
        for place, argument in enumerate(schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            self.count(value if written else None)
            self.count(None if argument.is_out or (place == 0 and name in WRITTEN_ONLY) else value)
        if not any(out.alias_info for out in schema.returns):
            self.count(result)
        return result


@pytest.mark.parametrize("taps", [3, 5])
@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_bytes_of_the_twin(precision, dtype, taps):
    rows = sum(LENGTHS)
    x = torch.randn(rows, 2 * CHANNELS).to(dtype).requires_grad_()
    shapes = (CHANNELS, taps), (CHANNELS,), (CHANNELS,), (CHANNELS,)
    parameters = [torch.randn(shape, requires_grad=True) for shape in shapes]
    cu_seqlens = torch.tensor([0, LENGTHS[0], rows], dtype=torch.int32)
    unit = rows * CHANNELS * 4
    with Traffic(unit) as forward:
        out = glu_conv_group_norm_silu(x, *parameters, cu_seqlens, num_groups=GROUPS, eps=1e-5)
    gradient = torch.ones_like(out)
    with Traffic(unit) as backward:
        torch.autograd.grad(out, [x, *parameters], gradient)
    tally = Tally(PRECISIONS[precision], 1)
    tally.convolution(rows, CHANNELS, taps, GROUPS, len(LENGTHS), fused=False)
    assert [moved / unit for moved in tally.total().moved] == [forward.moved, backward.moved]
