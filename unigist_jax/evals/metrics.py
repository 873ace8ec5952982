"""Scores of answers: substring match, accuracy of a label, ROUGE, NDCG; as HELMET's comparison takes them.

ROUGE is google-research's `rouge-score`, NDCG is scikit-learn's (requirements-eval.txt); both are imported when needed.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_LAST = -1e6  # score of an id that was not ranked
_RANKED = re.compile(r"[^\s>,]+(?:\s*>\s*[^\s>,]+)+")


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces (SQuAD's normalisation)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


def substring_match(output: str, answers: Sequence[str]) -> float:
    """1 if any answer stands in the output, both normalised."""
    return float(any(normalised(answer) in normalised(output) for answer in answers))


def expected_share(output: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand in the output, case-folded (RULER)."""
    return sum(answer.casefold() in output.casefold() for answer in answers) / len(answers)


def exact_label(output: str, answers: Sequence[str]) -> float:
    """1 if the first line, after a `label:` if there is one, is one of the answers, normalised."""
    said = re.split(r"label:", output.strip(), maxsplit=1, flags=re.IGNORECASE)[-1].strip().split("\n")[0]
    return float(normalised(said) in {normalised(answer) for answer in answers})


def choice(output: str, answers: Sequence[str]) -> float:
    """1 if the first letter A-D that stands alone in the output is the answer's."""
    found = re.search(r"\b([A-D])\b", output)
    return float(bool(found) and found[1] in {answer.strip()[:1].upper() for answer in answers})


def rouge(output: str, answers: Sequence[str], kind: str, part: str) -> float:
    """The best ROUGE over the answers: `kind` "rougeL" or "rougeLsum", `part` "recall" or "fmeasure"; stemmed."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], use_stemmer=True)
    split = _lines if kind == "rougeLsum" else str.strip
    return max(getattr(scorer.score(split(answer), split(output))[kind], part) for answer in answers)


def _lines(text: str) -> str:
    """A sentence a line, as ROUGE-Lsum wants it."""
    return "\n".join(re.split(r"(?<=[.!?])\s+", text.strip()))


def ranking_ndcg(output: str, labels: Mapping[str, float], k: int) -> float:
    """NDCG@k of the ids in the output's longest `a > b > c`; ids that it leaves out gain nothing.

    Args:
      labels: graded relevance by id.
    """
    from sklearn.metrics import ndcg_score

    chains = [re.split(r"\s*>\s*", found) for found in _RANKED.findall(output)]
    ranked = [name.strip("[]().") for name in max(chains, key=len, default=[])]
    place = {name: index for index, name in reversed(list(enumerate(ranked))) if name in labels}
    if not place or not any(labels.values()):
        return 0.0
    missing = [name for name in labels if name not in place]
    gains = [labels[name] for name in [*place, *missing]]
    scores = [-float(place[name]) for name in place] + [_LAST] * len(missing)
    # k stand-ins of no gain before the ids that were left out, so that these gain nothing
    return float(ndcg_score([gains + [0.0] * k], [scores + [_LAST + 1] * k], k=k))
