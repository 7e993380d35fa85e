"""Streams: manifests and text in, step-addressed typed batches out. Nothing here imports NeMo."""
