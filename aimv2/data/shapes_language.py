"""What can be said of a shapes scene: captions, and the parser that reads them back.

A caption is a full description: every object with its size, colour, shape and place, in one of three forms:

    a big red circle at top left and a small blue star at bottom right
    top left: big red circle, bottom right: small blue star
    the red circle at top left is big and the blue star at bottom right is small
"""

import math
import re

import numpy as np

from aimv2.data.shapes_world import COLOURS, SHAPES, SIZES, Object, Scene, world

_FORMS = (  # one object, and what joins objects
    ("a {size} {colour} {shape} at {place}", " and "),
    ("{place}: {size} {colour} {shape}", ", "),
    ("the {colour} {shape} at {place} is {size}", " and "),
)


def captions(scene: Scene) -> list[str]:
    """One caption of each form, the forms shuffled, the order of the objects drawn for each: any of them, the first
    included, is a uniform draw of (form, order).
    """
    rng = scene.generator("captions")
    return [_describe(form, [scene.objects[i] for i in rng.permutation(len(scene.objects))]) for form in _shuffled(rng)]


def _shuffled(rng: np.random.Generator) -> list[tuple[str, str]]:
    return [_FORMS[i] for i in rng.permutation(len(_FORMS))]


def _describe(form: tuple[str, str], objects: list[Object]) -> str:
    phrase, joint = form
    return joint.join(
        phrase.format(shape=thing.shape, colour=thing.colour, size=thing.size, place=thing.place) for thing in objects
    )


def caption_entropy(difficulty: str) -> float:
    """Exact entropy in nats of a caption given its image, on average over images: the least loss a captioner can have.

    Given the image, the set of objects is known; left to chance are the form (ln 3) and the order of n objects
    (ln n!). Different draws give different strings, because the forms differ in their first words and the objects in
    their places. n is uniform on 1 to `most_objects`.
    """
    most = world(difficulty).most_objects
    return math.log(len(_FORMS)) + sum(math.log(math.factorial(n)) for n in range(1, most + 1)) / most


def parse_caption(text: str, difficulty: str = "full") -> frozenset[tuple[str, str, str, str]] | None:
    """The set of (shape, colour, size, place) that a caption states, whatever its form and order.

    None when `text` is not a caption of this world: another wording, an unknown word, too many objects, or one place
    taken twice.
    """
    board = world(difficulty)
    words = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "place": board.places}
    groups = {name: f"(?P<{name}>{'|'.join(options)})" for name, options in words.items()}
    for phrase, joint in _FORMS:
        pattern = re.compile(phrase.format(**groups))
        matches = [pattern.fullmatch(part) for part in " ".join(text.split()).split(joint)]
        if all(matches) and len(matches) <= board.most_objects:
            found = frozenset(match.group("shape", "colour", "size", "place") for match in matches)
            distinct = len({place for *_, place in found}) == len(matches)
            return found if distinct else None
    return None
