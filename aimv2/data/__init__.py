"""Captioned images: shards, transforms, tokens, batches, and the embedded shapes world."""
