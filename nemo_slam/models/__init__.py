"""Models: pre-training and the encoder that goes into stock NeMo models."""
