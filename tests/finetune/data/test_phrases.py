import random

from lora_kernels.finetune.data import phrases as grammar
from lora_kernels.finetune.data.phrases import MAIN, SUBORDINATE, phrases


class Fixed(random.Random):
    """Draws the given English words."""

    def __init__(self, *words):
        super().__init__(0)
        self.words = set(words)

    def choice(self, options):
        return next(option for option in options if option[0] in self.words)


def test_the_grammar_is_german():
    words = ("dog", "garden", "old", "sees", "today", "we know that")
    assert grammar._sentence(Fixed(*words), MAIN) == (
        "the old dog sees the old garden today.",
        "heute sieht der alte Hund den alten Garten.",
    )
    assert grammar._sentence(Fixed(*words), SUBORDINATE) == (
        "we know that the old dog sees the old garden today.",
        "wir wissen, dass der alte Hund heute den alten Garten sieht.",
    )
    assert grammar._sentence(Fixed("cat", "house", "", "needs"), MAIN) == (
        "the cat needs the house.",
        "die Katze braucht das Haus.",
    )
    assert (
        grammar._sentence(Fixed("girl", "lamp", "big", "", "buys"), MAIN)[1]
        == "das große Mädchen kauft die große Lampe."
    )


def test_phrases_are_different_and_the_same_again():
    pairs = phrases(500, seed=3)
    assert len(set(pairs.sources)) == len(pairs) == 500
    assert phrases(500, seed=3) == pairs != phrases(500, seed=4)
    assert 150 < sum("dass" in target or " ob " in target for target in pairs.targets) < 350
    assert not any("," in target for target in phrases(100, kinds=(MAIN,)).targets)
    assert all("," in target for target in phrases(100, kinds=(SUBORDINATE,)).targets)
