"""Zero-shot classification: each class is the mean of its names in several sentences, each image goes to the nearest.

n test images, E length of a feature, C classes.
Source: CLIP (arXiv 2103.00020); the classifier is built by open_clip's own function.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from aimv2.evals.checks import require_classes
from aimv2.evals.datasets import Dataset
from aimv2.evals.encoders.packages import optional
from aimv2.evals.extraction import extract
from aimv2.evals.results import Outcome, classification_metrics, classification_samples, per_class
from aimv2.evals.session import Session
from aimv2.evals.text_image import ImageFeatures, TextImageModel

TEXTS = 512  # about, in a forward pass
NO_TEMPLATE = ("{}",)
IMAGENET = "imagenet"


@dataclass(slots=True, kw_only=True)
class ZeroShot:
    """templates: "dataset": its own, or "simple" where it has none; "imagenet": the 80 of CLIP; "simple": its best 7;
        "none": the bare names; or a file with one a line, "{}" for the class.
    classes: "dataset"; "imagenet": open_clip's 1000 names; or a file with one name a line, in order.

    Of the dataset "imagenet" with its 1000 classes "dataset" is "imagenet", for both.
    """

    name: ClassVar[str] = "zero_shot"
    trains: ClassVar[bool] = False
    templates: str = "dataset"
    classes: str = "dataset"

    def run(self, model: TextImageModel, data: Dataset, session: Session) -> Outcome:
        """Images that can't be read are wrong.

        Raises:
            ValueError: no labels, another number of class names than the dataset has, or a template without a place
                for the class.
        """
        require_classes(data, "zero-shot classification", train=False)
        names, templates, notes = self._names(data), *self._templates(data)
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            notes.append(f"classes of one name can't be told apart: {', '.join(twice[:5])}")
        build = optional("open_clip").build_zero_shot_classifier
        classifier = build(
            model,
            model.tokenizer,
            names,
            templates,
            num_classes_per_batch=max(1, TEXTS // len(templates)),
            device=model.device,
            use_tqdm=session.rank == 0 and not session.quiet,
        ).cpu()  # (E, C)
        images = extract(model, data.test, ImageFeatures(), session)
        scores = images.arrays["image"] @ classifier.numpy()  # (n, C)
        scores[~images.readable] = np.nan
        labels = data.test.labels
        return Outcome(
            metrics=classification_metrics(scores, labels),
            samples=classification_samples(scores, labels, data.test.keys),
            details={
                "templates": len(templates),
                "class_names": list(names),
                "per_class": per_class(scores, labels, data.classes),
                "notes": notes,
            },
            tensors={"classifier": classifier.contiguous()},
        )

    def _names(self, data: Dataset) -> Sequence[str]:
        source = _own(self.classes, data)
        if source == "dataset":
            names = data.classes
        elif source == IMAGENET:
            names = tuple(optional("open_clip").IMAGENET_CLASSNAMES)
        else:
            names = _lines(source)
        if len(names) != len(data.classes):
            raise ValueError(
                f"classes {self.classes!r}: {len(names)} names, expected {len(data.classes)} as {data.spec}"
            )
        return names

    def _templates(self, data: Dataset) -> tuple[list[Callable[[str], str]], list[str]]:
        """Functions, as open_clip takes them, and notes."""
        source, notes = _own(self.templates, data), []
        if source == "dataset" and not data.templates:
            source, notes = "simple", [f"{data.spec} has no templates: CLIP's best 7 are used"]
        if source == IMAGENET:
            return list(optional("open_clip").OPENAI_IMAGENET_TEMPLATES), notes
        if source == "simple":
            return list(optional("open_clip").SIMPLE_IMAGENET_TEMPLATES), notes
        templates = {"dataset": data.templates, "none": NO_TEMPLATE}.get(source) or _lines(source)
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"template {template!r}: expected {{}} for the class")
        return [partial(template.replace, "{}") for template in templates], notes


def _own(source: str, data: Dataset) -> str:
    """ "dataset", where that is ImageNet, is "imagenet"."""
    return IMAGENET if source == "dataset" and (data.name, len(data.classes)) == (IMAGENET, 1000) else source


def _lines(path: str) -> tuple[str, ...]:
    """Those of a file that are not blank. Raises ValueError for none."""
    file = Path(path).expanduser()
    try:
        lines = tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a text file with one entry a line ({error})") from error
    if not lines:
        raise ValueError(f"{path} is empty: expected one entry a line")
    return lines
