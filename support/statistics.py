"""Compare runs that answered the same questions: differences, standard errors, verdicts. A linear
probe, which shows what features contain, is here too.

Runs are identified by a row of a table and a seed: answers[row, seed] is a list of Questions.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from support.benchmarks import Question

Answers = dict[tuple[str, int], list[Question]]
STANDARD_ERRORS = 3  # between a difference and a bound, for a verdict
TIE = 0.02  # a difference whose size is surely below this is a tie


def inside(question: Question, subset: str) -> bool:
    """Whether a question is in a subset: "all", a kind, a first word or the text of a question.

    "not KIND": all questions of other kinds.
    """
    if subset.startswith("not "):
        return question.kind != subset.removeprefix("not ")
    return subset in ("all", question.kind, question.text, question.first_word)


def accuracy_gaps(answers: Answers, row: str, other: str | None, subset: str) -> np.ndarray:
    """Whether a row is right, minus whether another one is, for each seed and question.

    Returns (seeds, questions), with values -1, 0 and 1. other: None to subtract nothing. Only
    seeds that both rows have count, because the encoders depend on the seed.
    """
    asked = []
    for index, question in enumerate(answers[row, 0]):
        if inside(question, subset):
            asked.append(index)
    gaps = []
    for (name, seed), questions in answers.items():
        if name != row or (other and (other, seed) not in answers):
            continue
        gap = right(questions, asked)
        if other:
            gap = gap - right(answers[other, seed], asked)
        gaps.append(gap)
    return np.array(gaps)


def right(questions: list[Question], asked: list[int]) -> np.ndarray:
    """1.0 for each right answer and 0.0 for each wrong one, of the questions at these indices."""
    return np.array([questions[index].correct for index in asked], float)


def compare(
    answers: Answers,
    row: str,
    other: str | None = None,  # None: no difference, the accuracy of `row` alone
    subset: str = "all",  # which questions, see `inside`
    reference: str = "MERV",  # subtracted when the variance between seeds is estimated
) -> tuple[float, float]:
    """The mean of `accuracy_gaps` and its standard error, the larger of two estimates.

    Over clips: the questions about one clip depend on each other, so they are summed first. Over
    seeds: the variance is pooled over all rows that have several seeds.
    """
    gaps = accuracy_gaps(answers, row, other, subset)
    videos = [question.video for question in answers[row, 0] if inside(question, subset)]
    _, clip = np.unique(videos, return_inverse=True)
    deviations = gaps.mean(0) - gaps.mean()
    clip_sums = np.bincount(clip, deviations)
    num_clips = len(clip_sums)
    over_clips = clip_sums.std(ddof=1) * num_clips**0.5 / len(videos)

    against = reference if other else None
    variances = []
    for name, seed in answers:
        if seed == 1 and name != against:
            accuracies = accuracy_gaps(answers, name, against, subset).mean(1)
            variances.append(accuracies.var(ddof=1))
    variance = np.mean(variances) if variances else 0
    over_seeds = (variance / len(gaps)) ** 0.5
    return gaps.mean(), max(over_clips, over_seeds)


def verdict(difference: float, error: float, low: float = 0, high: float = 1) -> str:
    """The verdict on a claim that a difference lies between low and high.

    "holds": it does, by STANDARD_ERRORS standard errors or more. "does not hold": it lies outside
    by that much. "tie": neither, and its size plus two standard errors is below TIE; only a claim
    with the default bounds, that one row is above another, can be a tie. "undecided": all others.
    """
    margin = STANDARD_ERRORS * error
    if low < difference - margin and difference + margin < high:
        return "holds"
    if difference + margin < low or difference - margin > high:
        return "does not hold"
    if (low, high) == (0, 1) and abs(difference) + 2 * error < TIE:
        return "tie"
    return "undecided"


def commonest_share(answers: Answers, subset: str = "all") -> float:
    """The accuracy of giving every question of a subset its most common right answer."""
    questions = next(iter(answers.values()))
    right_answers = [question.expected for question in questions if inside(question, subset)]
    (_, count), *_ = Counter(right_answers).most_common(1)
    return count / len(right_answers)


def mean_mixing_weights(
    answers: Answers,
    row: str,  # its first seed is used
    subset: str = "all",
) -> list[tuple[float, float]]:
    """Mean and standard deviation over clips of the mixing weight of each encoder."""
    by_clip = {}
    for question in answers[row, 0]:
        if inside(question, subset):
            by_clip[question.video] = question.mixing_weights
    weights = np.array(list(by_clip.values()))  # (clips, encoders)
    means = weights.mean(0)
    deviations = weights.std(0)
    return list(zip(means, deviations, strict=True))


def linear_probe(
    features: Tensor,  # (n, d)
    words: list[str],  # the class of each row
    fitted: int,  # the first rows, to which the classifier is fitted; it is tested on the others
) -> float:
    """Accuracy of a linear classifier: a ridge regression to one-hot labels Y.

    Its predictions are X_new X^T (X X^T + 300 I)^-1 Y, with standardised features X.
    """
    features = (features - features.mean(0)) / features.std(0)
    x = features[:fitted]
    x_new = features[fitted:]
    classes, labels = np.unique(words, return_inverse=True)
    labels = torch.from_numpy(labels)
    y = F.one_hot(labels[:fitted]) - 1 / len(classes)
    kernel = x @ x.mT + 300 * torch.eye(fitted)
    inverse = torch.linalg.inv(kernel)
    scores = x_new @ x.mT @ inverse @ y
    is_right = scores.argmax(1) == labels[fitted:]
    return is_right.float().mean().item()
