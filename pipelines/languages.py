"""Tells whether a caption is in a language: by its script, and by its commonest words.

Captions are short, and what models do wrong is coarse: Chinese characters in English text, or a
caption that is German throughout. For that, scripts and a few words of each language are enough.
"""

import unicodedata

MIN_SCRIPT_SHARE = 0.9  # of the letters, in the language's script
MIN_FOREIGN = 2  # common words of another language, and more than of the wanted one

# The commonest words of each language that are (nearly) none in the others.
COMMON = {
    "en": "a an the and of with is are that has it on in its at to for by from which this over his",
    "de": "der die das und ist mit ein eine einem einen auf den dem von zu sich im auch wird sind",
    "fr": "le la les et des est une dans avec du sur qui pour au aux sont cette ce il elle",
    "es": "el la los las y es una con del en que por para se su un al está son",
    "it": "il lo la gli e è una con del della di che per si sono nel nella un alla",
    "pt": "o a os as e é uma com do da de que por para se um ao não são no",
    "nl": "de het een en is met van op dat die te zijn voor aan er ook naar wordt bij",
}
LATIN = ("LATIN",)
LANGUAGES = {  # by ISO 639-1: the beginnings of Unicode's names of its letters
    **dict.fromkeys(COMMON, LATIN),
    "zh": ("CJK",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"),
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "ar": ("ARABIC",),
}
WORDS = {language: frozenset(words.split()) for language, words in COMMON.items()}


def script_share(text: str, language: str) -> float:
    """Returns the share of a text's letters that are of a language's script; 1 without letters."""
    letters = [c for c in text if c.isalpha()]
    scripts = LANGUAGES[language]
    own = sum(unicodedata.name(letter, "").startswith(scripts) for letter in letters)
    return own / len(letters) if letters else 1.0


def problem_with_language(text: str, words: list[str], language: str) -> str | None:
    """Says why a text, given its words too, is not in a language; None where it may well be."""
    share = script_share(text, language)
    if share < MIN_SCRIPT_SHARE:
        return (
            f"expected {MIN_SCRIPT_SHARE:g} of the letters or more in the script of {language!r},"
            f" got {share:.3f}"
        )
    if language not in WORDS:
        return None

    counts = {name: sum(word in common for word in words) for name, common in WORDS.items()}
    best = max(counts, key=counts.get)
    if counts[best] >= MIN_FOREIGN and counts[best] > 2 * counts[language]:
        return (
            f"expected a text in {language!r}, got {counts[best]} common words of {best!r} and"
            f" {counts[language]} of its own"
        )
    return None
