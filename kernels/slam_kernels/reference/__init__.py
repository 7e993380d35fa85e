"""The PyTorch twins: the meaning of every operator, on any device, with autograd, without Triton."""
