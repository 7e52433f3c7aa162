"""MileBench's scoring (Song et al., arXiv 2404.18532) by the rules of its released evaluator, quirks included.

    multi-choice   the chosen option's letter is extracted from the answer and compared
    open-ended     ROUGE-L F of the `rouge` package 1.0.1, which counts distinct words
    needle tasks   the reference is one of the answer's words;  MMCoQA: it occurs anywhere in the answer

The released evaluator takes an empty answer for a choice of "C". `Score.released` is its number; in `Score.score` an
answer from which no option can be extracted is wrong, and `Score.unanswered` says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# in the order in which the released evaluator takes them out
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
SPECIAL = set("\\.^$*+?{}[]|()")  # characters that the evaluator escapes in options
PERIODS = 32  # at most so many periods are removed: the evaluator passes a flag of `re` in place of a count
EMPTY_CHOICE = "C"


class Score(NamedTuple):
    score: float
    released: float
    unanswered: float


def score(kind: str, answer: str, reference: str, choices: Sequence[str] = ()) -> Score:
    """Score one answer. kind: "choice", "rouge", "needle" or "contains" (see kind_of).

    Raises ValueError for another kind, or for a reference that is not among the choices.
    """
    given, expected = normal(answer), normal(reference)
    empty = float(not given)
    if kind == "choice":
        options = [normal(choice) for choice in choices]
        if expected not in options:
            raise ValueError(f"the reference {reference!r} is none of the choices {list(choices)}")
        letters = {letter_of(i): option for i, option in enumerate(options)}
        chosen, right = extract(given, letters), letter_of(options.index(expected))
        taken = chosen or (EMPTY_CHOICE if not given else "")
        return Score(float(chosen == right), float(taken == right), float(not chosen))
    if kind == "rouge":
        value = rouge_l(given, expected)
    elif kind == "needle":
        value = float(expected in given.split())
    elif kind == "contains":
        value = float(expected in given)
    else:
        raise ValueError(f"got {kind=}; accepted: choice, rouge, needle, contains")
    return Score(value, value, empty)


def kind_of(task: str, question_type: str) -> str:
    """The scoring of a task: by its name for the needle tasks and MMCoQA, else by `question_type` of its file.

    Raises ValueError for a question type that the evaluator does not know.
    """
    if "NeedleInAHaystack" in task:
        return "needle"
    if "MMCoQA" in task:
        return "contains"
    kinds = {"multi-choice": "choice", "open-ended": "rouge"}
    if question_type not in kinds:
        raise ValueError(f"{task}: got question_type {question_type!r}; accepted: {', '.join(kinds)}")
    return kinds[question_type]


def letter_of(index: int) -> str:
    return chr(ord("A") + index)


def normal(text: str) -> str:
    """Text as it is compared: lower case, without periods except before a digit. A punctuation mark is removed where it
    occurs beside a space, or where the text has a number like 1,000; else it becomes a space."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    numbers = re.search(r"\d,\d", text)
    result = text
    for mark in PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if beside_space or numbers else " ")
    result = re.sub(r"\.(?!\d)", "", result, count=PERIODS)
    return result.strip("'").strip('"').strip().lower()


def extract(answer: str, options: Mapping[str, str]) -> str:
    """The letter of the option that a normalized answer names, "" where none can be found.

    options   letter -> normalized text
    In this order: the first "letter text" in the answer; the first option's text, spaces aside; an answer of one
    letter; the only option letter among the answer's characters.
    """
    if not answer:
        return ""
    named = first_of(answer, [(letter, normal(f"{letter} {text}")) for letter, text in options.items()])
    if named:
        return named[1][0].upper()
    closed = first_of(answer.replace(" ", ""), [(k, text.replace(" ", "")) for k, text in options.items()])
    # the evaluator compares what it found with the escaped text, so it misses options with special characters
    if closed and not SPECIAL & set(closed[1]):
        return next(k for k, text in options.items() if text.replace(" ", "") == closed[1])
    if len(answer) == 1 and answer.upper() in options:
        return answer.upper()
    letters = [character.upper() for character in answer if character.upper() in options]
    return letters[0] if len(letters) == 1 else ""


def first_of(text: str, parts: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """The (key, part) that occurs first in the text, of two at one place the earlier part; None where none does."""
    found = [(text.find(part), i) for i, (_, part) in enumerate(parts) if part in text]
    return parts[min(found)[1]] if found else None


def rouge_l(answer: str, reference: str) -> float:
    """F of the longest common subsequence, over distinct words; sentences end at periods. 0 for an empty answer.

    Raises ValueError for an empty reference.
    """
    given, expected = sentences(answer), sentences(reference)
    if not expected:
        raise ValueError(f"the reference {reference!r} has no words")
    if not given:
        return 0.0
    common = set().union(*(common_words(r, a) for r in expected for a in given))
    recall, precision = len(common) / distinct(expected), len(common) / distinct(given)
    return 2 * precision * recall / (precision + recall + 1e-8)


def sentences(text: str) -> list[list[str]]:
    return [part.split() for part in text.split(".") if part.split()]


def distinct(parts: Sequence[Sequence[str]]) -> int:
    return len({word for part in parts for word in part})


def common_words(reference: Sequence[str], answer: Sequence[str]) -> set[str]:
    """Words of the longest common subsequence; of several, the one found by walking back, answer first."""
    n, m = len(reference), len(answer)
    length = [[0] * (m + 1) for _ in range(n + 1)]
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            same = reference[i - 1] == answer[j - 1]
            length[i][j] = length[i - 1][j - 1] + 1 if same else max(length[i - 1][j], length[i][j - 1])
    words, i, j = set(), n, m
    while i and j:
        if reference[i - 1] == answer[j - 1]:
            words.add(reference[i - 1])
            i, j = i - 1, j - 1
        elif length[i - 1][j] > length[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words
