"""BERTScore: how near two texts are in an encoder's hidden states, token by token (Zhang et al., 2020, §3).

    recall     the cosine of each token of the reference to the nearest one of the text, on average
    precision  the cosine of each token of the text to the nearest one of the reference, on average
    F1         their harmonic mean; of several references the best

As in the authors' bert-score: special tokens may be the nearest, but are not averaged over; no weights by rarity, no
rescaling; the layer is the one they found to agree best with people. An empty text scores 0.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prefixkit.config import Dtype, EvaluationConfig
from prefixkit.errors import ConfigError
from prefixkit.evaluation.progress import OnTexts
from prefixkit.models import Base, load_base_model
from prefixkit.models.sources import resolve_source
from prefixkit.models.weights import input_device

#: Layers as bert-score 0.3.13 has them, by the last part of a model's name.
_LAYERS = {
    "bert-base-uncased": 9, "bert-large-uncased": 18, "bert-base-multilingual-cased": 9, "roberta-base": 10,
    "roberta-large": 17, "distilroberta-base": 5, "distilbert-base-uncased": 5, "xlm-roberta-base": 9,
    "xlm-roberta-large": 17, "deberta-base-mnli": 9, "deberta-large-mnli": 18, "deberta-xlarge-mnli": 40,
}  # fmt: skip
_BATCH = 32


class BertScorer:
    """Compares texts with references.

    Args:
        base: an encoder.
        layer: whose hidden states are compared; 1 is the first.

    Raises:
        ConfigError: the model is no encoder, or has fewer layers.
    """

    def __init__(self, base: Base, layer: int) -> None:
        if not base.reads_both_ways:
            raise ConfigError(f"evaluation.bertscore_model: {base.id} is no encoder; give one, such as roberta-large")
        layers = base.model.config.num_hidden_layers
        if layer > layers:
            raise ConfigError(f"evaluation.bertscore_layer: {base.id} has {layers} layers, got {layer}")
        self._base, self._layer = base, layer

    def f1(self, texts: Sequence[str], references: Sequence[Sequence[str]], told: OnTexts | None = None) -> list[float]:
        """Return the F1 of every text with the best of its references, at most 1.

        Args:
            texts: what is scored.
            references: of each text at least one.
            told: about progress.
        """
        wanted = dict.fromkeys(text.strip() for text in (*texts, *(each for own in references for each in own)))
        order = sorted(filter(None, wanted), key=len)
        states: dict[str, _States] = {}
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            states |= zip(batch, self._read(batch), strict=True)
            if told is not None:
                told(len(texts) * len(states) // len(order), len(texts))
        return [
            max(_f1(states.get(text.strip()), states.get(each.strip())) for each in own)
            for text, own in zip(texts, references, strict=True)
        ]

    @torch.no_grad()
    def _read(self, texts: Sequence[str]) -> list["_States"]:
        # A space in front: the first word is then a word as any other, where spaces belong to tokens (RoBERTa's).
        batch = self._base.tokenizer(
            [f" {text}" for text in texts], padding=True, truncation=True, max_length=self._base.context_tokens,
            return_special_tokens_mask=True, return_tensors="pt",
        )  # fmt: skip
        is_special = batch.pop("special_tokens_mask").bool()
        inputs = batch.to(input_device(self._base.model))
        hidden = self._base.model(**inputs, output_hidden_states=True).hidden_states[self._layer]  # [b, t, e]
        nearness = torch.nn.functional.normalize(hidden.double().cpu(), dim=-1)
        is_text = inputs["attention_mask"].bool().cpu()
        return [
            _States(row[real], ~special[real]) for row, real, special in zip(nearness, is_text, is_special, strict=True)
        ]


class _States:
    """A text's hidden states of length 1, and which of them are words of the text."""

    def __init__(self, vectors: Float[Tensor, "t e"], is_word: Bool[Tensor, "t"]) -> None:
        self.vectors, self.is_word = vectors, is_word


def _f1(text: _States | None, reference: _States | None) -> float:
    if text is None or reference is None or not (text.is_word.any() and reference.is_word.any()):
        return 0.0
    cosines = text.vectors @ reference.vectors.T  # [t, r]
    precision = float(cosines.amax(dim=1)[text.is_word].mean())
    recall = float(cosines.amax(dim=0)[reference.is_word].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def check_scorer(settings: EvaluationConfig) -> int:
    """Return the layer to compare, and say before training what would fail afterwards.

    Raises:
        ConfigError: the model is none whose best layer is known, and no layer is given.
        ModelError: there is no such model.
    """
    assert settings.bertscore_model is not None
    resolve_source(settings.bertscore_model)
    layer = settings.bertscore_layer or _LAYERS.get(settings.bertscore_model.rstrip("/").rpartition("/")[2])
    if layer is None:
        raise ConfigError(
            f"evaluation.bertscore_layer: which layer of {settings.bertscore_model} to compare is not known; give it, "
            "such as two thirds of its layers"
        )
    return layer


def load_scorer(settings: EvaluationConfig) -> BertScorer | None:
    """Return what compares answers; None where no model for it is named.

    Raises:
        ConfigError: the model is no encoder, or has no such layer.
        ModelError: it cannot be loaded.
    """
    if settings.bertscore_model is None:
        return None
    layer = check_scorer(settings)
    return BertScorer(load_base_model(settings.bertscore_model, dtype=Dtype.FLOAT32), layer)
