"""What a recipe asks for and this machine cannot do is said before anything is loaded."""

import pytest

from prefixkit.config import validate_recipe
from prefixkit.errors import ConfigError
from prefixkit.evaluation import overlap
from prefixkit.lab.run.loading import load_for


def test_a_metric_without_its_package_is_refused_before_the_base_model_is_looked_for(monkeypatch):
    monkeypatch.setattr(overlap, "find_spec", lambda name: None)
    recipe = validate_recipe({
        "model": {"base": "no/such-model"},
        "data": {"format": "input_target", "source": "no/such-data"},
        "evaluation": {"metrics": ["bleu", "rouge"]},
    })  # fmt: skip
    with pytest.raises(ConfigError, match=r"evaluation.metrics: rouge needs rouge-score, which is not installed; pip"):
        load_for(recipe)
