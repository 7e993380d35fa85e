"""The Triton kernels, each registered as a ``torch.library`` operator. Importing a module here needs triton."""
