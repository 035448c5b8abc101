"""What a recipe asks for and this machine cannot do is said before anything is loaded."""

import pytest

from prefixkit.config import validate_recipe
from prefixkit.data import NO_LOSS, Example
from prefixkit.errors import ConfigError, DataError
from prefixkit.evaluation import overlap
from prefixkit.lab.run.loading import check_single_replies, load_for


def test_a_metric_without_its_package_is_refused_before_the_base_model_is_looked_for(monkeypatch):
    monkeypatch.setattr(overlap, "find_spec", lambda name: None)
    recipe = validate_recipe({
        "model": {"base": "no/such-model"},
        "data": {"format": "input_target", "source": "no/such-data"},
        "evaluation": {"metrics": ["bleu", "rouge"]},
    })  # fmt: skip
    with pytest.raises(ConfigError, match=r"evaluation.metrics: rouge needs rouge-score, which is not installed; pip"):
        load_for(recipe)


def test_an_infix_before_one_of_several_replies_is_refused():
    """It would be learned before the first of them, and used before the last."""

    def example(*labels):
        return Example("user: and the plot?", "good\nweak", tuple(range(len(labels))), labels)

    one, two = example(NO_LOSS, NO_LOSS, 2, 3), example(NO_LOSS, 1, NO_LOSS, 3)
    check_single_replies([one, one])
    with pytest.raises(DataError) as caught:
        check_single_replies([one, two])
    assert str(caught.value) == (
        "method=infix stands before one reply, and several are learned of the conversation that ends "
        "'user: and the plot?'; give conversations of one reply each, or use method=prefix"
    )
