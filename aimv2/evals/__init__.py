"""Evaluations: `model -> {"metric": number}`, called alike by the training loop and by the scripts."""
