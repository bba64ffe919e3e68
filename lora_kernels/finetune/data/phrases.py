"""Made-up English sentences with their German, by a small grammar: a parallel text that needs no download.

Synthetic, and said to be so wherever it is used; but what must be learned is real grammar: three genders, two cases,
the endings of adjectives, the verb that comes second in a main clause and last in a subordinate one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from lora_kernels.finetune.data.pairs import Pairs

NOUNS = (
    ("man", "Mann", "m"), ("woman", "Frau", "f"), ("child", "Kind", "n"), ("dog", "Hund", "m"), ("cat", "Katze", "f"),
    ("horse", "Pferd", "n"), ("teacher", "Lehrer", "m"), ("friend", "Freund", "m"), ("neighbour", "Nachbar", "m"),
    ("queen", "Königin", "f"), ("girl", "Mädchen", "n"), ("bird", "Vogel", "m"), ("doctor", "Arzt", "m"),
    ("sister", "Schwester", "f"), ("cow", "Kuh", "f"), ("sheep", "Schaf", "n"), ("guest", "Gast", "m"),
    ("daughter", "Tochter", "f"), ("son", "Sohn", "m"), ("animal", "Tier", "n"),
)  # fmt: skip
THINGS = (
    ("house", "Haus", "n"), ("garden", "Garten", "m"), ("street", "Straße", "f"), ("book", "Buch", "n"),
    ("table", "Tisch", "m"), ("lamp", "Lampe", "f"), ("picture", "Bild", "n"), ("tree", "Baum", "m"),
    ("flower", "Blume", "f"), ("car", "Auto", "n"), ("train", "Zug", "m"), ("town", "Stadt", "f"),
    ("letter", "Brief", "m"), ("clock", "Uhr", "f"), ("window", "Fenster", "n"), ("bridge", "Brücke", "f"),
)  # fmt: skip
ADJECTIVES = (
    ("small", "klein"), ("big", "groß"), ("old", "alt"), ("young", "jung"), ("red", "rot"), ("beautiful", "schön"),
    ("new", "neu"), ("quiet", "ruhig"), ("strong", "stark"), ("clever", "klug"), ("good", "gut"),
    ("strange", "seltsam"),
)  # fmt: skip
VERBS = (
    ("sees", "sieht"), ("finds", "findet"), ("loves", "liebt"), ("seeks", "sucht"), ("knows", "kennt"),
    ("buys", "kauft"), ("paints", "malt"), ("shows", "zeigt"), ("needs", "braucht"), ("describes", "beschreibt"),
)  # fmt: skip
TIMES = (
    ("today", "heute"), ("often", "oft"), ("now", "jetzt"), ("here", "hier"), ("always", "immer"), ("again", "wieder"),
)  # fmt: skip
THOUGHTS = (
    ("I believe that", "ich glaube, dass"), ("we know that", "wir wissen, dass"), ("she says that", "sie sagt, dass"),
    ("he asks whether", "er fragt, ob"), ("it is true that", "es ist wahr, dass"),
)  # fmt: skip
ARTICLES = {"subject": {"m": "der", "f": "die", "n": "das"}, "object": {"m": "den", "f": "die", "n": "das"}}
MAIN, SUBORDINATE = "main", "subordinate"
KINDS = (MAIN, SUBORDINATE)


def phrases(count: int, seed: int = 0, kinds: Sequence[str] = KINDS) -> Pairs:
    """``count`` different sentence pairs, English to German, always the same for a seed.

    kinds: "main" ("the old dog sees the garden today." / "heute sieht der alte Hund den Garten.") and "subordinate"
    ("we know that the old dog sees the garden today." / "wir wissen, dass der alte Hund heute den Garten sieht.").
    """
    draw, pairs = random.Random(seed), dict[str, str]()
    while len(pairs) < count:
        source, target = _sentence(draw, draw.choice(list(kinds)))
        pairs.setdefault(source, target)
    return Pairs(list(pairs), list(pairs.values()))


def _sentence(draw: random.Random, kind: str) -> tuple[str, str]:
    (subject, Subjekt), (thing, Objekt) = _noun_phrase(draw, NOUNS, "subject"), _noun_phrase(draw, THINGS, "object")
    verb, Verb = draw.choice(VERBS)
    when, Wann = draw.choice((*TIMES, ("", "")))
    if kind == MAIN:
        german = [Wann, Verb, Subjekt, Objekt] if when else [Subjekt, Verb, Objekt]
        return _joined([subject, verb, thing, when]), _joined(german)
    thought, Gedanke = draw.choice(THOUGHTS)
    return _joined([thought, subject, verb, thing, when]), _joined([Gedanke, Subjekt, Wann, Objekt, Verb])


def _noun_phrase(draw: random.Random, nouns: Sequence[tuple[str, str, str]], case: str) -> tuple[str, str]:
    english, german, gender = draw.choice(nouns)
    adjective, Adjektiv = draw.choice((*ADJECTIVES, ("", "")))
    if Adjektiv:
        Adjektiv += "en" if case == "object" and gender == "m" else "e"
    return _phrase(["the", adjective, english]), _phrase([ARTICLES[case][gender], Adjektiv, german])


def _phrase(words: Sequence[str]) -> str:
    return " ".join(word for word in words if word)


def _joined(words: Sequence[str]) -> str:
    return f"{_phrase(words)}."
