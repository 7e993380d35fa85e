"""The operators of nemo_slam: tensors in, tensors out, no NeMo."""
