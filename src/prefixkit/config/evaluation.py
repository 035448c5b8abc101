"""Settings of the evaluation."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field, model_validator

from prefixkit.config.section import Section


class Metric(StrEnum):
    """How near a written text comes to those that people wrote for the same input."""

    BLEU = "bleu"
    CHRF = "chrf"
    ROUGE = "rouge"
    METEOR = "meteor"
    NIST = "nist"


class EvaluationConfig(Section):
    """What is measured after training, and on how much."""

    heldout_rows: int = Field(128, ge=1)
    """Test rows the held-out loss is measured on."""
    contrast_rows: int = Field(128, ge=0)
    """Test rows of other labels; the gap between the two losses is the steering."""
    samples: int = Field(256, ge=0)
    """Texts generated per system; 0 leaves the measures on generated text out. Where inputs are answered, at most so
    many inputs, each of them once."""
    prompts: list[str] | None = Field(None, min_length=1)
    """What the generations continue, in turn; left out, data.prompt for texts, test inputs otherwise."""
    metrics: list[Annotated[Metric, Field(strict=False)]] | None = None
    """Where inputs are answered (formats input_target and messages): measures of the answers against all texts that
    people wrote for the same input; left out, all whose packages are installed."""
    bertscore_model: str | None = None
    """Likewise: an encoder (folder or hub id, such as roberta-large) in whose hidden states answers are compared with
    references; left out, there is no BERTScore. --memory-budget does not count it."""
    bertscore_layer: int | None = Field(None, ge=1)
    """Which of its layers to compare; the authors of BERTScore take 17 of roberta-large, 10 of roberta-base, 18 of
    bert-large-uncased, 9 of bert-base-uncased and 5 of distilbert-base-uncased."""
    instruction: str | None = None
    """A hand-written instruction for the base model: the baseline every prefix must beat."""
    baselines: bool = True
    """Measure the base model, alone and with the instruction, on the same rows and prompts; false saves that time where
    they are known from another run."""
    judge: bool = True
    """Train a sentiment judge on the judge rows and score generations with it; needs labels."""
    latency_tokens: int = Field(0, ge=0)
    """Tokens each system writes, one text at a time and three times over, to time them; 0 leaves that out. On a machine
    that does other things too, the times say little."""
    bootstrap: int = Field(1000, ge=100)
    """Resamples behind each 95% interval."""
    novelty_n: int = Field(5, ge=2)
    """Length of the n-grams novelty counts."""
    seed: int = Field(0, ge=0)
    """Seed of sampling and resampling; separate from train.seed so that every run meets the same dice."""

    @model_validator(mode="after")
    def _layer_is_of_a_model(self) -> "EvaluationConfig":
        if (self.bertscore_model is None) != (self.bertscore_layer is None):
            raise ValueError(
                "bertscore_model and bertscore_layer go together, such as roberta-large and 17; give both, or neither"
            )
        return self
