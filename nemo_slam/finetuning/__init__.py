"""Fine-tuning: the pre-trained encoder inside stock NeMo models, with the run folder and the resume of pre-training."""
