"""What a small LiT model, by transformers' word, says about images."""

import numpy as np
import pytest
import torch
from lit_settings import CLASSES, CONFIG, PROCESSING, TEMPLATES
from PIL import Image
from tiny_models import random_lit

from aimv2.exports import export_model


@pytest.fixture(scope="session")
def lit_exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lit")
    model = random_lit(CONFIG)
    with torch.no_grad():
        model.pool.query.normal_(std=2.0)  # else it looks at all patches alike, and features are nearly parallel
    for format in ("ours", "transformers"):
        export_model(model, folder / format, config=CONFIG, processing=PROCESSING, format=format)
    return folder


@pytest.fixture(scope="session")
def pictures():
    """24 images of several sizes and two modes, with large differences."""
    generator, found = np.random.default_rng(0), []
    for number in range(24):
        small = Image.fromarray(generator.integers(0, 256, (5, 4, 3), dtype=np.uint8))
        image = small.resize((60 + number, 90 - number), Image.Resampling.BILINEAR)
        found.append(image.convert("L") if number == 7 else image)
    return found


@pytest.fixture(scope="session")
def reference(lit_exports):
    """transformers' model and image processor, and CLIP's ids from open_clip."""
    open_clip = pytest.importorskip("open_clip")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(lit_exports / "transformers", attn_implementation="eager").eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(lit_exports / "transformers")

    @torch.no_grad()
    def features(images=(), texts=()):
        if images:
            pixels = processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
            vectors = model.get_image_features(pixels)
        else:
            ids = open_clip.get_tokenizer("ViT-B-32")(list(texts))
            vectors = model.get_text_features(ids, attention_mask=torch.ones_like(ids))  # without one it is not causal
        vectors = getattr(vectors, "pooler_output", vectors)
        return vectors / vectors.norm(dim=-1, keepdim=True)

    return features


@pytest.fixture(scope="session")
def labels(reference, pictures):
    """By the mean of a class's unit vectors over the templates, as in CLIP's paper."""
    classifier = torch.stack(
        [reference(texts=[form.format(c=name) for form in TEMPLATES]).mean(dim=0) for name in CLASSES]
    )
    scores = reference(pictures) @ (classifier / classifier.norm(dim=-1, keepdim=True)).T
    labels = scores.argmax(dim=1)
    best = scores.topk(2).values
    assert len(labels.unique()) >= 3 and (best[:, 0] - best[:, 1]).min() > 1e-5  # else the test would not say much
    return labels
