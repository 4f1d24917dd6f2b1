"""Patch features: pictures of them, and a probe that tells patches apart."""
