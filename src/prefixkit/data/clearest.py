"""Which texts say their label most clearly.

A label is given to a whole text, but a prefix learns from its opening, and many a positive review opens with what
others disliked. A logistic regression on words and word pairs ranks the rows; none is ranked by a classifier that
was fitted to it. It is of the same kind as evaluation's judge, but learns from training rows alone, as the judge
learns from none of them.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline

from prefixkit.data.rows import Row
from prefixkit.errors import DataError

_FOLDS = 5
#: Inverse strength of the regularisation; TF-IDF rows have length 1.
_C = 4.0


def clearest_rows(rows: Sequence[Row], others: Sequence[Row], *, share: float, words: int) -> tuple[Row, ...]:
    """Return the rows whose openings most clearly have their own label.

    Args:
        rows: rows of one label.
        others: rows of other labels, to tell them from; all labels but the first count as one.
        share: of `rows` to keep, in (0, 1]; at least one is kept.
        words: length of an opening.

    Returns:
        The kept rows, in the order given.

    Raises:
        DataError: there are too few rows of either kind to fit and rank.
    """
    if share == 1:
        return tuple(rows)
    if min(len(rows), len(others)) < _FOLDS:
        raise DataError(
            f"data.clearest: needs at least {_FOLDS} training rows with and without the label, got {len(rows)} and "
            f"{len(others)}; set it to 1"
        )
    openings = [" ".join(row.learned.split()[:words]) for row in (*rows, *others)]
    is_own = np.arange(len(openings)) < len(rows)
    counts = HashingVectorizer(ngram_range=(1, 2), alternate_sign=False, norm=None, n_features=2**18)
    features = make_pipeline(counts, TfidfTransformer(sublinear_tf=True)).fit_transform(openings)
    clarity = np.zeros(len(openings))
    for fit, rank in StratifiedKFold(_FOLDS, shuffle=True, random_state=0).split(openings, is_own):
        classifier = LogisticRegression(C=_C, max_iter=200).fit(features[fit], is_own[fit])
        clarity[rank] = classifier.predict_proba(features[rank])[:, 1]
    kept = np.argsort(-clarity[: len(rows)], kind="stable")[: max(1, round(share * len(rows)))]
    return tuple(rows[place] for place in sorted(kept))
