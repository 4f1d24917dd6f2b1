"""Our models by the interfaces of other people's harnesses: CLIP_benchmark, timm and mteb."""
