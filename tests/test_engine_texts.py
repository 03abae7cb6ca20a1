"""Each rule about captions, on both sides of its threshold."""

import pytest
from engine_data import kept, record_of, rectangle, rules
from perceptiondlm.pipelines.languages import script_share
from perceptiondlm.pipelines.text_filters import (
    TextFilters,
    TextOptions,
    repeated_ngrams,
    repeated_sentences,
    words_of,
)

MASK = rectangle((40, 40), 0, 0, 10, 10)
GOOD = "A red ceramic mug with a white handle, standing on a wooden table."


def filtered(*captions, scores=None, **options):
    record = record_of(
        *[MASK] * len(captions), caption=captions, score=scores or [None] * len(captions)
    )
    TextFilters(TextOptions(**options))([record])
    assert len(record.regions) + len(record.dropped) == len(captions)
    return record


def rule_of(caption, **options):
    return rules(filtered(caption, **options)).get("a")


def test_a_good_caption_stays():
    assert rule_of(GOOD) is None


@pytest.mark.parametrize("caption", [None, "", "  \n"])
def test_no_text_is_no_caption(caption):
    assert rule_of(caption) == "empty"


@pytest.mark.parametrize(
    ("count", "rule"), [(2, "short"), (3, None), (8, None), (9, "long"), (1, "short")]
)
def test_words_are_counted(count, rule):
    words = "one blue wooden chair near some tall shelf there".split()
    assert rule_of(" ".join(words[:count]), min_words=3, max_words=8) == rule


def test_what_a_word_is():
    assert words_of("The cat's T-shirt, 2 sizes.") == ["the", "cat's", "t-shirt", "2", "sizes"]
    assert words_of("红色的杯子") == list("红色的杯子")


def test_repeated_ngrams_are_counted():
    assert repeated_ngrams("a b c d", 2) == 0
    assert repeated_ngrams("a b a b a b", 2) == pytest.approx(3 / 5)  # ab ba ab ba ab
    assert repeated_ngrams("a b", 4) == 0


@pytest.mark.parametrize(("share", "rule"), [(0.6, None), (0.59, "ngrams")])
def test_a_caption_that_goes_in_circles_is_dropped(share, rule):
    options = {"ngram": 2, "max_repeated_ngrams": share, "language": None}
    assert rule_of("red blue red blue red blue", **options) == rule


def test_sentences_are_compared_by_their_words():
    assert repeated_sentences("A cup. It is red! a  CUP. A cup") == ["a cup", "a cup"]


@pytest.mark.parametrize(("count", "rule"), [(1, None), (0, "sentences")])
def test_a_sentence_that_comes_again_is_dropped(count, rule):
    caption = "A cup is here. The handle of this mug is white and round. A cup is here."
    assert rule_of(caption, max_repeated_sentences=count, max_repeated_ngrams=1.0) == rule


@pytest.mark.parametrize(
    "caption",
    [
        "As an AI language model I describe a red cup.",
        "I'm sorry, but this is hard to say here.",
        "I cannot see what the object in front is.",
        "The provided image shows a red cup on a table.",
        "A red cup inside the masked region of the photo.",
        "The highlighted area shows a red cup.",
        "A red cup with a blue bounding box around it.",
        "Sure! Here is what it shows: a red cup.",
        "Here is a detailed caption: a red cup.",
        "A red cup, see https://example.com for more.",
        "Caption: a red cup on a table.",
        "A red cup on a table, stock photo.",
        "It is impossible to determine the object.",
        "A red cup <br> on a table.",
    ],
)
def test_what_captioners_say_when_they_do_not_caption_is_dropped(caption):
    assert rule_of(caption) == "pattern"


@pytest.mark.parametrize(
    "caption",
    [
        "A man wearing a black mask over his mouth.",
        "A red outline drawn on a white poster.",
        "A sign that says sorry in white letters.",
        "A framed picture of a cup on the wall.",
        "An apartment block with a blue box on top.",
        "A bright part of the highlighted hair of a woman.",
    ],
)
def test_captions_that_use_the_same_words_otherwise_stay(caption):
    assert rule_of(caption) is None


def test_patterns_can_be_added_and_replaced():
    assert rule_of(GOOD, more_patterns=["ceramic"]) == "pattern"
    assert rule_of("As an AI I see a red cup.", patterns=["ceramic"]) is None


@pytest.mark.parametrize(
    ("caption", "language", "rule"),
    [
        (GOOD, "en", None),
        ("Eine rote Tasse mit einem weißen Griff auf dem Tisch.", "en", "language"),
        ("Eine rote Tasse mit einem weißen Griff auf dem Tisch.", "de", None),
        (GOOD, "de", "language"),
        ("Une tasse rouge avec une anse blanche sur la table.", "en", "language"),
        ("红色的陶瓷杯子放在桌子上", "en", "language"),
        ("红色的陶瓷杯子放在桌子上", "zh", None),
        ("Красная чашка на столе.", "ru", None),
        ("Красная чашка на столе.", "en", "language"),
        ("Eine rote Tasse mit einem weißen Griff auf dem Tisch.", None, None),
        ("large dotted blue star", "en", None),  # no common word of any language
    ],
)
def test_captions_in_another_language_are_dropped(caption, language, rule):
    assert rule_of(caption, language=language) == rule


@pytest.mark.parametrize(
    ("caption", "rule"),
    [
        ("Tasse der Katze", None),  # one common word of German
        ("Tasse der Katze auf Tisch", "language"),  # two
        ("Tasse der Katze auf Tisch with handle", None),  # and one of English
        ("Tasse der Katze auf mit Tisch with handle", "language"),  # three
    ],
)
def test_common_words_of_another_language_are_counted(caption, rule):
    assert rule_of(caption) == rule


def test_a_share_of_other_letters_is_allowed():
    assert script_share("abcdefghi木", "en") == 0.9
    nine = "a sign that reads 木 in white letters"
    assert rule_of(nine) is None
    assert rule_of("a sign 木木木木 here") == "language"


@pytest.mark.parametrize(("overlap", "dropped"), [(0.5, {}), (0.49, {"b": "copy"})])
def test_captions_that_share_their_words_are_copies(overlap, dropped):
    # 3 words in common of 6
    record = filtered("red cup table white", "red cup table old wood", max_overlap=overlap)
    assert rules(record) == dropped


def test_of_copies_the_surest_stays_and_equal_ones_keep_the_first():
    assert kept(filtered(GOOD, GOOD, GOOD, scores=[-2.0, -1.0, None])) == "b"
    assert kept(filtered(GOOD, GOOD)) == "a"
    assert kept(filtered(GOOD, GOOD, max_overlap=1.0)) == "ab"


def test_every_reason_says_what_was_expected_and_what_came():
    (entry,) = filtered("a cup").dropped
    assert (entry.stage, entry.reason) == ("texts", "expected 3 words or more, got 2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_words": 5, "max_words": 4}, "texts.min_words of at most texts.max_words"),
        ({"language": "xx"}, "texts.language to be one of en"),
        ({"more_patterns": ["("]}, r"regular expression in texts.patterns, got '\('"),
        ({"max_overlap": 1.5}, "texts.max_overlap between 0 and 1"),
        ({"max_repeated_sentences": -1}, "texts.max_repeated_sentences of 0 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TextOptions(**options)
