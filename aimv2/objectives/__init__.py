"""Training objectives: each a module `Batch -> {"loss", ...}` in one file."""
