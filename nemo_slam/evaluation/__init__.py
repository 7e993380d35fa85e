"""Evaluation: transcripts of trained models, scores of text with their uncertainty, and probes of the encoder."""
