"""What a system writes, and everything that is measured on it; the same on what people wrote."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefixkit.config import Recipe
from prefixkit.data import NO_LOSS, Example
from prefixkit.data.encoding import Piece, encode_pieces
from prefixkit.evaluation.asking import Asked
from prefixkit.evaluation.bertscore import BertScorer
from prefixkit.evaluation.copying import Copying, TrainingTexts
from prefixkit.evaluation.fluency import fluency_losses
from prefixkit.evaluation.judge import SentimentJudge
from prefixkit.evaluation.measures import SET_MEASURES, Measures, Scores
from prefixkit.evaluation.progress import OnTexts, Progress
from prefixkit.evaluation.scores import Sample
from prefixkit.evaluation.systems import System
from prefixkit.generation import decode, generate_texts
from prefixkit.logs import get_logger
from prefixkit.models import Base
from prefixkit.seeding import derive

log = get_logger(__name__)

#: What stands before the keys of real texts in scores.json.
REAL = "real."


@dataclass(frozen=True)
class Writing:
    """What every system's texts are made from and held against; the same for all of them.

    Attributes:
        base: the frozen model, with nothing attached.
        recipe: its evaluation and generation settings.
        asked: what is continued, and what people wrote for it.
        judge: the judge and the label it listens for; None leaves the judging out.
        training: what texts may have been copied from.
        measures: makes the scores.
        scorer: compares answers by their hidden states; None leaves that out.
    """

    base: Base
    recipe: Recipe
    asked: Asked
    judge: tuple[SentimentJudge, str] | None
    training: TrainingTexts
    measures: Measures
    scorer: BertScorer | None = None

    def score(self, system: System, progress: Progress) -> tuple[list[Sample], Scores]:
        """Let a system write, and return its texts and their scores.

        Raises:
            DataError: a prompt cannot be continued; see `generate_texts`.
        """
        prompts, references = self.asked.prompts, self.asked.references
        texts = generate_texts(
            self.base,
            system.prompts(prompts),
            self.recipe.generation,
            seed=derive(self.recipe.evaluation.seed, "evaluation.samples"),
            prefix=system.prefix,
            source_tokens=system.source_tokens(self.base, self.recipe.data.max_tokens),
            on_progress=progress.stage(f"{system.name}: writing", len(prompts)),
        )
        verdicts, probabilities = self._judge(texts)
        copies = self._compare(texts)
        samples = [
            Sample(
                system.name.value, place, prompt, text, verdicts[place], probabilities[place], copy.longest, copy.spans,
                references[place] if references else (),
            )
            for place, (prompt, text, copy) in enumerate(zip(prompts, texts, copies, strict=True))
        ]  # fmt: skip
        told = progress.stage(f"{system.name}: fluency", len(texts))
        scores = self._scores(system.name, prompts, texts, verdicts, copies, told)
        if references:
            told = progress.stage(f"{system.name}: references", len(texts))
            scores |= self.measures.overlap(texts, references, told)
            if self.scorer is not None:
                told = progress.stage(f"{system.name}: BERTScore", len(texts))
                scores |= self.measures.bertscore(self.scorer.f1(texts, references, told))
        return samples, scores

    def score_real(self, progress: Progress) -> Scores:
        """Return the scores of held-out texts that people wrote, cut to the longest a system may write.

        They are what the systems' scores are to be read beside: people are neither as predictable as a model nor
        always of one voice. Measures of the whole set are left out where there are fewer texts than a system writes.
        """
        examples = self.asked.people
        prompts = [example.prompt for example in examples]
        texts = [self._opening_of(example) for example in examples]
        verdicts, _ = self._judge(texts)
        told = progress.stage("people: fluency", len(texts))
        scores = self._scores("people", prompts, texts, verdicts, self._compare(texts), told)
        if len(texts) < len(self.asked.prompts):  # fewer texts look more diverse
            scores = {key: score for key, score in scores.items() if key not in SET_MEASURES}
        return scores

    def _scores(
        self,
        name: str,
        prompts: Sequence[str],
        texts: Sequence[str],
        verdicts: Sequence[bool | None],
        copies: Sequence[Copying],
        told: OnTexts,
    ) -> Scores:
        scores = self.measures.texts(texts) | self.measures.copying(copies)
        if any(texts):
            read = self.recipe.data.max_tokens
            losses = fluency_losses(self.base, prompts, texts, source_tokens=read, on_progress=told)
            scores |= self.measures.fluency(losses)
        else:
            log.warning("%s: every text it wrote is empty; fluency is left out", name)
        if self.judge is not None:
            scores |= self.measures.sentiment([bool(verdict) for verdict in verdicts])
        return scores

    def _judge(self, texts: Sequence[str]) -> tuple[list[bool | None], list[float | None]]:
        """Return the judge's verdict on each text and its probability of the wanted label; None without a judge."""
        if self.judge is None:
            return [None] * len(texts), [None] * len(texts)
        judge, label = self.judge
        return list(judge.share(texts, label)), list(judge.probabilities(texts, label))

    def _compare(self, texts: Sequence[str]) -> list[Copying]:
        return [self.training.compare(text, self.recipe.evaluation.novelty_n) for text in texts]

    def _opening_of(self, example: Example) -> str:
        """Return the beginning of what follows the prompt, as many tokens as a system may write.

        What was learned of a long conversation may end before its last reply, to which the prompt leads up.
        """
        if example.last_reply is not None:
            pieces = [(Piece(example.prompt, is_learned=False), Piece(example.last_reply, is_learned=True))]
            ((_, answer),) = encode_pieces(pieces, self.base.tokenizer)
            return decode(self.base, list(answer)[: self.recipe.generation.max_new_tokens])
        learned = [token for token in example.labels if token != NO_LOSS]
        return decode(self.base, learned[: self.recipe.generation.max_new_tokens])
