"""What a system writes, and everything that is measured on it."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefixkit.config import Recipe
from prefixkit.evaluation.copying import TrainingTexts
from prefixkit.evaluation.fluency import fluency_losses
from prefixkit.evaluation.judge import SentimentJudge
from prefixkit.evaluation.measures import Measures, Scores
from prefixkit.evaluation.progress import Progress
from prefixkit.evaluation.scores import Sample
from prefixkit.evaluation.systems import System
from prefixkit.generation import generate_texts
from prefixkit.logs import get_logger
from prefixkit.models import Base
from prefixkit.seeding import derive

log = get_logger(__name__)


@dataclass(frozen=True)
class Writing:
    """What every system's texts are made from and held against; the same for all of them.

    Attributes:
        base: the frozen model, with nothing attached.
        recipe: its evaluation and generation settings.
        prompts: what is continued, one per sample.
        judge: the judge and the label it listens for; None leaves the judging out.
        training: what texts may have been copied from.
        measures: makes the scores.
    """

    base: Base
    recipe: Recipe
    prompts: tuple[str, ...]
    judge: tuple[SentimentJudge, str] | None
    training: TrainingTexts
    measures: Measures

    def score(self, system: System, progress: Progress) -> tuple[list[Sample], Scores]:
        """Let a system write, and return its texts and their scores.

        Raises:
            DataError: a prompt cannot be continued; see `generate_texts`.
        """
        texts = generate_texts(
            self.base,
            system.prompts(self.prompts),
            self.recipe.generation,
            seed=derive(self.recipe.evaluation.seed, "evaluation.samples"),
            prefix=system.prefix,
            on_progress=progress.stage(f"{system.name}: writing", len(self.prompts)),
        )
        scores = self.measures.texts(texts) | self._fluency(system, texts, progress)
        is_wanted: list[bool | None] = [None] * len(texts)
        probability: list[float | None] = [None] * len(texts)
        if self.judge is not None:
            judge, label = self.judge
            verdicts = judge.share(texts, label)
            scores |= self.measures.sentiment(verdicts)
            is_wanted, probability = list(verdicts), list(judge.probabilities(texts, label))
        copies = [self.training.compare(text, self.recipe.evaluation.novelty_n) for text in texts]
        scores |= self.measures.copying(copies)
        samples = [
            Sample(
                system.name.value, place, prompt, text, is_wanted[place], probability[place], copy.longest, copy.spans
            )
            for place, (prompt, text, copy) in enumerate(zip(self.prompts, texts, copies, strict=True))
        ]
        return samples, scores

    def _fluency(self, system: System, texts: Sequence[str], progress: Progress) -> Scores:
        """Return the perplexity of the texts under the bare base model, given the prompt without instruction."""
        told = progress.stage(f"{system.name}: fluency", len(texts))
        if not any(texts):
            log.warning("%s: every text it wrote is empty; fluency is left out", system.name)
            return {}
        return self.measures.fluency(fluency_losses(self.base, self.prompts, texts, on_progress=told))
