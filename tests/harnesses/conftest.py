"""What a small LiT model, by transformers' word, says about images."""

import numpy as np
import pytest
import torch
from lit_settings import CLASSES, CONFIG, PROCESSING, TEMPLATES, transformers_features
from PIL import Image
from tiny_models import V2, random_encoder, random_lit

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
def exports(tmp_path_factory):
    """An encoder in three layouts."""
    from timm_settings import PROCESSING

    folder, encoder = tmp_path_factory.mktemp("exports"), random_encoder(V2)
    for format in ("ours", "timm", "transformers"):
        export_model(encoder, folder / format, config=V2, processing=PROCESSING, format=format)
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
    return transformers_features(lit_exports / "transformers")


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
