"""AIM and AIMv2 vision encoders: pre-training, evaluation and use as a vision tower."""
