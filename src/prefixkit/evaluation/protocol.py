"""The protocol: three systems, the same held-out rows, the same prompts, the same dice.

    held-out rows   ->  loss of each system on wanted and on contrasting texts
    prompts + dice  ->  texts of each system  ->  judge, fluency, repetition, diversity, copying
    inputs + dice   ->  texts of each system  ->  the same, and the distance from what people wrote for them
    held-out texts  ->  cut to the length of generations, measured in the same way: what people score

Rows are picked in the order of their content's hash, so a file sorted by date or label is no trap, and the
same rows are picked in every run.
"""

from collections.abc import Callable, Sequence
from functools import partial

from prefixkit.config import Format, Recipe
from prefixkit.data import WORDS_PER_TOKEN, Example, PreparedData, ask
from prefixkit.data.stream import window_size
from prefixkit.errors import EvaluationError
from prefixkit.evaluation.asking import asked_of
from prefixkit.evaluation.bertscore import load_scorer
from prefixkit.evaluation.copying import TrainingTexts
from prefixkit.evaluation.judge import SentimentJudge
from prefixkit.evaluation.latency import measure_latency
from prefixkit.evaluation.loss import TokenLosses, check_examples, heldout_loss
from prefixkit.evaluation.measures import HeldOutLosses, Measures
from prefixkit.evaluation.picking import hash_of_texts, pick
from prefixkit.evaluation.progress import OnProgress, Progress
from prefixkit.evaluation.scores import Evaluation, Sample, Score
from prefixkit.evaluation.systems import System, SystemName, system_of, systems_to_compare
from prefixkit.evaluation.writing import REAL, Writing
from prefixkit.generation import check_length, encode_prompts
from prefixkit.logs import get_logger
from prefixkit.models import Base
from prefixkit.prefix import Prefix
from prefixkit.seeding import derive

log = get_logger(__name__)


def evaluate(
    base: Base, prefix: Prefix, data: PreparedData, recipe: Recipe, *, on_progress: OnProgress | None = None
) -> Evaluation:
    """Measure a prefix beside the base model and beside the base model with the recipe's instruction.

    The same arguments give the same scores, times excepted. Keys that need what is not there (labels, an instruction,
    generated texts) are absent.

    Args:
        base: the frozen model, with nothing attached.
        prefix: what is measured.
        data: the run's data; its test, contrast and judge rows are used, its training texts for novelty.
        recipe: its evaluation and generation settings.
        on_progress: told about progress.

    Raises:
        EvaluationError: a text does not fit the context, or a loss is not finite.
        DataError: a prompt cannot be continued; see `generate_texts`.
        InjectionError: the prefix does not fit the model; see `attach`.
    """
    settings = recipe.evaluation
    wanted, contrast = pick(data.test, settings.heldout_rows), pick(data.contrast, settings.contrast_rows)
    systems = systems_to_compare(prefix, settings.instruction) if settings.baselines else [system_of(prefix)]
    asked = asked_of(data.test, recipe, ask=_asking(base, recipe))
    people = len(asked.people) if settings.baselines else 0
    compared = (1 if settings.bertscore_model is None else 2) * len(asked.references)
    size = len(wanted) + len(contrast) + 2 * len(asked.prompts) + compared
    progress = Progress(on_progress, size * len(systems) + people)
    measures = Measures(settings)
    scores: dict[str, Score] = {}
    samples: list[Sample] = []
    by_input = recipe.data.format in (Format.INPUT_TARGET, Format.MESSAGES)
    heldout = [_heldout(base, system, wanted, contrast, progress, by_input=by_input) for system in systems]
    plain = {system.name: losses for system, losses in zip(systems, heldout, strict=True)}.get(SystemName.BASE)
    for system, losses in zip(systems, heldout, strict=True):
        found = measures.heldout(losses)
        if plain is not None and losses is not plain:
            found |= measures.steering(losses, plain)
        found["trainable_parameters"] = Score(system.trained_parameters)
        scores |= {system.key + key: score for key, score in found.items()}
    if settings.latency_tokens:
        scores |= _latency(base, systems, data, recipe)
    if settings.samples:
        judge = _train_judge(data, recipe)
        if judge is not None and data.judge_test_rows:
            scores |= measures.judge(judge[0], data.judge_test_rows)
        texts = TrainingTexts(_training_texts(prefix, data, recipe))
        scorer = load_scorer(settings) if asked.references else None
        writing = Writing(base, recipe, asked, judge, texts, measures, scorer)
        for system in systems:
            own, found = writing.score(system, progress)
            samples += own
            scores |= {system.key + key: score for key, score in found.items()}
        if settings.baselines:
            scores |= {REAL + key: score for key, score in writing.score_real(progress).items()}
    return Evaluation(scores, tuple(samples), texts=hash_of_texts([*wanted, *contrast], asked.prompts))


def _training_texts(prefix: Prefix, data: PreparedData, recipe: Recipe) -> list[str]:
    """Return what a prefix learned from; of a stream, the windows that were read of it."""
    if data.stream is None:
        return [example.text for example in data.train]
    train = recipe.train
    taken = train.steps if prefix.card.training is None else prefix.card.training.steps
    return data.stream.texts(window_size(recipe.data, train), taken * train.accumulation * train.batch_size)


def check_context(base: Base, data: PreparedData, recipe: Recipe, *, prefix_tokens: int) -> None:
    """Raise if anything an evaluation will read or write does not fit the model's context: before training, not after.

    Args:
        base: the base model.
        data: the run's data.
        recipe: its evaluation and generation settings.
        prefix_tokens: positions the prefix takes.

    Raises:
        DataError: the longest prompt and the new tokens do not fit, behind the prefix or behind the instruction.
        EvaluationError: a held-out text does not fit behind the instruction.
    """
    settings, asked = recipe.evaluation, asked_of(data.test, recipe, ask=_asking(base, recipe))
    rows = [*pick(data.test, settings.heldout_rows), *pick(data.contrast, settings.contrast_rows)]
    for system in systems_to_compare(None, recipe.evaluation.instruction):
        read = prefix_tokens if system.name is SystemName.BASE else 0  # the base model stands for the prefix here
        check_examples(base, system.examples(base, rows), prefix_tokens=read)
        writes = [(list(dict.fromkeys(asked.prompts)), recipe.generation.max_new_tokens, "generation.max_new_tokens")]
        if recipe.evaluation.latency_tokens:
            timed = recipe.evaluation.latency_tokens + 1
            writes.append(([_first_prompt(base, data, recipe)], timed, "evaluation.latency_tokens"))
        for texts, new_tokens, setting in writes:
            source = system.source_tokens(base, recipe.data.max_tokens)
            if prompts := encode_prompts(base, system.prompts(texts), source_tokens=source):
                check_length(base, prompts, max_new_tokens=new_tokens, prefix_tokens=read, setting=setting)


def _asking(base: Base, recipe: Recipe) -> Callable[[str], str]:
    return partial(ask, config=recipe.data, tokenizer=base.tokenizer, has_encoder=base.start_token_id is not None)


def _heldout(
    base: Base,
    system: System,
    wanted: Sequence[Example],
    contrast: Sequence[Example],
    progress: Progress,
    *,
    by_input: bool,
) -> HeldOutLosses:
    """Return what rows cost a system; those with one input are not independent, and count together."""

    def measure(examples: Sequence[Example]) -> TokenLosses:
        told = progress.stage(f"{system.name}: held-out loss", len(examples))
        losses = heldout_loss(base, system.examples(base, examples), prefix=system.prefix, on_progress=told)
        return losses.summed_by([example.prompt for example in examples]) if by_input else losses

    return HeldOutLosses(measure(wanted), measure(contrast) if contrast else None)


def _latency(base: Base, systems: Sequence[System], data: PreparedData, recipe: Recipe) -> dict[str, Score]:
    settings = recipe.evaluation
    found = measure_latency(
        base,
        systems,
        _first_prompt(base, data, recipe),
        tokens=settings.latency_tokens,
        source_tokens=recipe.data.max_tokens,
    )
    return {system.key + "seconds_per_token": found[system.name] for system in systems}


def _first_prompt(base: Base, data: PreparedData, recipe: Recipe) -> str:
    """Return what the timed tokens follow: the first of the prompts, or of the held-out rows."""
    given = recipe.evaluation.prompts
    return _asking(base, recipe)(given[0]) if given else pick(data.test, 1)[0].prompt


def _train_judge(data: PreparedData, recipe: Recipe) -> tuple[SentimentJudge, str] | None:
    """Return a judge and the label it listens for, or None where the data has no labels for one."""
    label = data.kept_label
    if not recipe.evaluation.judge or label is None or not data.judge_rows:
        return None
    try:
        judge = SentimentJudge.train(
            data.judge_rows,
            derive(recipe.evaluation.seed, "judge"),
            window_words=max(1, round(recipe.generation.max_new_tokens * WORDS_PER_TOKEN)),
        )
        judge.share([], label)
    except EvaluationError as error:
        # The prefix is trained and most of its scores need no judge: go on without one, and say so.
        log.warning("sentiment is not measured: %s", error)
        return None
    return judge, label
