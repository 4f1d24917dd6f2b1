"""What can be said of a shapes scene: captions and the parser that reads them back, references, questions.

A caption is a full description: every object with its size, colour, shape and place, in one of three forms:

    a big red circle at top left and a small blue star at bottom right
    top left: big red circle, bottom right: small blue star
    the red circle at top left is big and the blue star at bottom right is small
"""

import itertools
import math
import re
from typing import NamedTuple

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


class Reference(NamedTuple):
    """Words that mean one object of a scene."""

    expression: str
    object: int  # its index in scene.objects
    box: tuple[float, float, float, float]  # xyxy in [0, 1]
    with_place: bool  # the words alone tell the place; only between twins, which nothing else tells apart


class Question(NamedTuple):
    kind: str  # a key of question_chances
    question: str
    answer: str


def references(scene: Scene) -> list[Reference]:
    """For each object of a scene with several, its shortest unambiguous expression, drawn among equally short ones.

    Whoever boxes a random object is right in one of len(scene.objects).
    """
    if len(scene.objects) < 2:
        return []
    rng = scene.generator("references")
    found = []
    for index, thing in enumerate(scene.objects):
        expression, with_place = _refer(rng, scene, thing, ("size", "colour", "shape"))
        box = tuple(edge / side for edge, side in zip(thing.box, 2 * scene.canvas, strict=True))
        found.append(Reference(expression=expression, object=index, box=box, with_place=with_place))
    return found


def _refer(rng: np.random.Generator, scene: Scene, thing: Object, allowed: tuple[str, ...]) -> tuple[str, bool]:
    """The shortest expression of `allowed` attributes that fits only `thing`, or its place; and whether the latter."""
    fitting = []
    for number in range(len(allowed) + 1):
        for names in itertools.combinations(allowed, number):
            rivals = [o for o in scene.objects if all(getattr(o, name) == getattr(thing, name) for name in names)]
            if len(rivals) == 1:
                adjectives = [getattr(thing, name) for name in names if name != "shape"]
                fitting.append(" ".join(["the", *adjectives, thing.shape if "shape" in names else "object"]))
    if not fitting:
        return f"the object at {thing.place}", True
    fewest = min(expression.count(" ") for expression in fitting)
    shortest = [expression for expression in fitting if expression.count(" ") == fewest]
    return shortest[rng.integers(len(shortest))], False


def question_chances(difficulty: str) -> dict[str, float]:
    """Kind of question -> accuracy of a guess: the answers of each kind are uniform, whatever the question's words."""
    board = world(difficulty)
    return {
        "exists": 1 / 2,
        "colour": 1 / len(COLOURS),
        "shape": 1 / len(SHAPES),
        "size": 1 / len(SIZES),
        "place": 1 / len(board.places),
        "count": 1 / board.most_objects,
    }


def questions(scene: Scene) -> list[Question]:
    """One question of each kind, about a random object (none about the place where only places tell objects apart).

    The words that pick out the object never use what is asked for, and an object's attributes are independent and
    uniform, so the words carry no hint of the answer.
    """
    rng = scene.generator("questions")
    asked = [_exists(rng, scene)]
    for kind, phrase in (
        ("colour", "what colour is {}?"),
        ("shape", "what shape is {}?"),
        ("size", "is {} big or small?"),
        ("place", "where is {}?"),
    ):
        thing = scene.objects[rng.integers(len(scene.objects))]
        allowed = tuple(name for name in ("size", "colour", "shape") if name != kind)
        words, with_place = _refer(rng, scene, thing, allowed)
        if not (kind == "place" and with_place):
            asked.append(Question(kind=kind, question=phrase.format(words), answer=getattr(thing, kind)))
    return [*asked, Question(kind="count", question="how many objects are there?", answer=str(len(scene.objects)))]


def _exists(rng: np.random.Generator, scene: Scene) -> Question:
    """The answer is drawn first. For a no, one attribute of an object is changed to make what is not there."""
    present = {(thing.colour, thing.shape) for thing in scene.objects}
    colour, shape = sorted(present)[rng.integers(len(present))]
    answer = ("yes", "no")[rng.integers(2)]
    if answer == "no":
        absent = [(c, s) for c in COLOURS for s in SHAPES if (c == colour) != (s == shape) and (c, s) not in present]
        colour, shape = absent[rng.integers(len(absent))]
    return Question(kind="exists", question=f"is there a {colour} {shape}?", answer=answer)
