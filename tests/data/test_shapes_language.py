import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aimv2.data.shapes import (
    COLOURS,
    SHAPES,
    SIZES,
    WORLDS,
    caption_entropy,
    captions,
    parse_caption,
    question_chances,
    questions,
    references,
    scene,
)

DIFFICULTIES = tuple(WORLDS)
scenes = st.builds(
    scene,
    st.integers(0, 2**40),
    st.sampled_from(("train", "validation", "test")),
    st.integers(0, 10**9),
    st.sampled_from(DIFFICULTIES),
)


@pytest.fixture(scope="module", params=DIFFICULTIES)
def many(request):
    """1500 scenes of a difficulty."""
    return [scene(5, "train", i, request.param) for i in range(1500)]


def assert_uniform(values, options):
    """Each option's count is within 4.5 standard deviations of its share: fails by chance less than once in 10^5."""
    count, n, p = Counter(values), len(values), 1 / len(options)
    assert set(count) <= set(options)
    for option in options:
        assert abs(count[option] - n * p) < 4.5 * math.sqrt(n * p * (1 - p)), (option, count[option], n * p)


# Captions


@settings(max_examples=300, deadline=None)
@given(scenes)
def test_every_caption_says_exactly_what_is_there(drawn):
    texts = captions(drawn)
    assert len(set(texts)) == 3
    for text in texts:
        assert parse_caption(text, drawn.difficulty) == frozenset(thing.attributes for thing in drawn.objects)
        assert parse_caption(text) == parse_caption(f" {text.replace(' ', '  ')}\n")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "big red circle",
        "a big red circle",
        "a big red circle at top left and",
        "a big red circle at top left and a small blue star at top left",
        "a big red circle at top left and a big red circle at top left",
        "a big red circle at top left and the blue star at top is small",
        "a huge red circle at top left",
        "a red big circle at top left",
        "top left: big red circle,",
        "top left: big red circle bottom right: small blue star",
        "the red circle at top left is big is big",
        " and ".join(f"a big red circle at {place}" for place in ("top", "left", "right", "bottom")),
    ],
)
def test_what_is_no_caption_does_not_parse(text):
    assert parse_caption(text) is None


def test_places_must_be_of_the_difficulty():
    assert parse_caption("a big red circle at centre", "full")
    assert parse_caption("a big red circle at centre", "quick") is None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(("a ", "the ", "big ", "red ", "circle", " at ", "top", " left", " is ", " and ", ":", ", "))
    )
)
def test_the_parser_takes_anything(words):
    found = parse_caption("".join(words))
    assert found is None or 1 <= len(found) <= 3


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_caption_entropy_is_that_of_the_captions(difficulty):
    """Counted: for the same objects, all captions that come up, their number and frequencies."""
    entropies = []
    most = WORLDS[difficulty].most_objects
    for number in range(1, most + 1):
        drawn = next(s for i in range(99) if len((s := scene(0, "train", i, difficulty)).objects) == number)
        copies = [replace(drawn, index=i) for i in range(1500)]
        for pick in range(3):
            texts = [captions(copy)[pick] for copy in copies]
            assert_uniform(texts, sorted(set(texts)))
            assert len(set(texts)) == 3 * math.factorial(number)
        entropies.append(math.log(len(set(texts))))
    assert caption_entropy(difficulty) == pytest.approx(sum(entropies) / most, abs=1e-12)  # the number is uniform


# References and questions


def _meant(expression, objects):
    """The objects that an expression fits, read word by word."""
    words, _, place = expression.partition(" at ")
    words = [word for word in words.split() if word not in ("the", "object")]
    return [t for t in objects if set(words) <= set(t.attributes) and place in ("", t.place)]


@settings(max_examples=200, deadline=None)
@given(scenes)
def test_references_fit_one_object_and_none_is_shorter(drawn):
    found = references(drawn)
    assert [reference.object for reference in found] == list(range(len(drawn.objects))) * (len(drawn.objects) > 1)
    for reference in found:
        thing = drawn.objects[reference.object]
        assert _meant(reference.expression, drawn.objects) == [thing]
        assert np.multiply(reference.box, 2 * drawn.canvas) == pytest.approx(thing.box)
        twins = [o for o in drawn.objects if o.attributes[:3] == thing.attributes[:3]]
        assert reference.with_place == (len(twins) > 1) == (" at " in reference.expression)
        length = len(reference.expression.split())
        for noun in ("object", thing.shape):
            for size in ("", thing.size):
                for colour in ("", thing.colour):
                    other = " ".join(f"the {size} {colour} {noun}".split())
                    assert len(other.split()) >= length or _meant(other, drawn.objects) != [thing]


def _answer(question, objects):
    """What a reader of the scene's objects answers."""
    if question == "how many objects are there?":
        return str(len(objects))
    if match := re.fullmatch(r"is there a (\w+) (\w+)\?", question):
        return "yes" if any((t.colour, t.shape) == match.groups() for t in objects) else "no"
    match = re.fullmatch(r"(?:what (colour|shape) is|where is|is) (the .*?)( big or small)?\?", question)
    (thing,) = _meant(match[2], objects)
    return getattr(thing, match[1] or ("size" if match[3] else "place"))


def test_questions_have_the_right_answers(many):
    for drawn in many:
        asked = questions(drawn)
        assert all(_answer(q.question, drawn.objects) == q.answer for q in asked)
        kinds = [q.kind for q in asked]
        expected = [kind for kind in question_chances(drawn.difficulty) if kind != "place" or "place" in kinds]
        assert kinds == expected
        if "place" not in kinds:
            assert len({t.attributes[:3] for t in drawn.objects}) < len(drawn.objects)


def test_answers_are_uniform_whatever_the_words(many):
    board = WORLDS[many[0].difficulty]
    options = {
        "exists": ("yes", "no"),
        "colour": COLOURS,
        "shape": SHAPES,
        "size": SIZES,
        "place": board.places,
        "count": [str(n) for n in range(1, board.most_objects + 1)],
    }
    asked = [q for drawn in many for q in questions(drawn)]
    chances = question_chances(board.name)
    assert chances == {kind: 1 / len(answers) for kind, answers in options.items()}
    for kind, answers in options.items():
        chosen = [q for q in asked if q.kind == kind]
        assert_uniform([q.answer for q in chosen], answers)
        for question, n in Counter(q.question for q in chosen).most_common(8):
            if n / len(answers) > 20:  # enough for the normal bound
                assert_uniform([q.answer for q in chosen if q.question == question], answers)
