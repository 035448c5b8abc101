"""BERTScore: how near two texts are in an encoder's hidden states, token by token (Zhang et al., 2020, §3).

    recall     the cosine of each token of the reference to the nearest one of the text, on average
    precision  the cosine of each token of the text to the nearest one of the reference, on average
    F1         their harmonic mean; of several references the best

As in the authors' bert-score: special tokens may be the nearest, but are not averaged over; no weights by rarity, no
rescaling. An empty text scores 0.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

from prefixkit.compat import is_encoder
from prefixkit.config import Attention, Dtype, EvaluationConfig
from prefixkit.errors import ConfigError
from prefixkit.evaluation.progress import OnTexts
from prefixkit.models import Base, load_base_model
from prefixkit.models.sources import resolve_source
from prefixkit.models.survey import read_config
from prefixkit.models.weights import input_device

_BATCH = 32


class BertScorer:
    """Compares texts with references; what it has read it remembers, for the next system's texts.

    Args:
        base: an encoder.
        layer: whose hidden states are compared; 1 is the first.
    """

    def __init__(self, base: Base, layer: int) -> None:
        self._base, self._layer = base, layer
        self._known: dict[str, _Read] = {}

    def f1(self, texts: Sequence[str], references: Sequence[Sequence[str]], told: OnTexts) -> list[float]:
        """Return the F1 of every text with the best of its references, at most 1.

        Args:
            texts: what is scored.
            references: of each text at least one.
            told: about progress.
        """
        met = {text.strip() for text in (*texts, *(each for own in references for each in own))}
        new = sorted(met - self._known.keys() - {""}, key=len)  # nothing is read of an empty text
        for start in range(0, len(new), _BATCH):
            batch = new[start : start + _BATCH]
            self._known |= zip(batch, self._read(batch), strict=True)
            told(start + len(batch), len(new))
        told(len(new), len(new))
        return [
            max(_f1(self._known.get(text.strip()), self._known.get(each.strip())) for each in own)
            for text, own in zip(texts, references, strict=True)
        ]

    @torch.no_grad()
    def _read(self, texts: Sequence[str]) -> list["_Read"]:
        # A space in front: the first word is then a word as any other, where spaces belong to tokens (RoBERTa's).
        batch = self._base.tokenizer(
            [f" {text}" for text in texts], padding=True, truncation=True, max_length=self._base.context_tokens,
            return_special_tokens_mask=True, return_tensors="pt",
        )  # fmt: skip
        is_special = batch.pop("special_tokens_mask").bool()
        inputs = batch.to(input_device(self._base.model))
        hidden = self._base.model(**inputs, output_hidden_states=True).hidden_states[self._layer]  # [b, t, e]
        directions = functional.normalize(hidden, dim=-1).cpu()
        is_text = inputs["attention_mask"].bool().cpu()
        rows = zip(directions, is_text, is_special, strict=True)
        return [_Read(row[real], ~special[real]) for row, real, special in rows]


class _Read:
    """Directions of a text's hidden states, and which of them belong to words of the text."""

    def __init__(self, directions: Float[Tensor, "t e"], is_word: Bool[Tensor, "t"]) -> None:
        self.directions, self.is_word = directions, is_word


def _f1(text: _Read | None, reference: _Read | None) -> float:
    if text is None or reference is None or not (text.is_word.any() and reference.is_word.any()):
        return 0.0
    cosines = text.directions @ reference.directions.T  # [t, r]
    precision = float(cosines.amax(dim=1)[text.is_word].mean())
    recall = float(cosines.amax(dim=0)[reference.is_word].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def check_scorer(settings: EvaluationConfig) -> None:
    """Say before training what would fail afterwards; weights are not read.

    Raises:
        ConfigError: the model is no encoder, or has no such layer.
        ModelError: there is no such model.
    """
    if settings.bertscore_model is None or settings.bertscore_layer is None:
        return
    config: PretrainedConfig = read_config(resolve_source(settings.bertscore_model))
    if not is_encoder(config):
        raise ConfigError(
            f"evaluation.bertscore_model: {settings.bertscore_model} is no encoder; give one, such as roberta-large"
        )
    if settings.bertscore_layer > config.num_hidden_layers:
        raise ConfigError(
            f"evaluation.bertscore_layer: {settings.bertscore_model} has {config.num_hidden_layers} layers, got "
            f"{settings.bertscore_layer}"
        )


def load_scorer(settings: EvaluationConfig) -> BertScorer | None:
    """Return what compares answers; None where no model for it is named.

    Raises:
        ConfigError: as `check_scorer` does.
        ModelError: it cannot be loaded.
    """
    if settings.bertscore_model is None or settings.bertscore_layer is None:
        return None
    check_scorer(settings)
    base = load_base_model(settings.bertscore_model, dtype=Dtype.FLOAT32, attention=Attention.EAGER)
    return BertScorer(base, settings.bertscore_layer)
