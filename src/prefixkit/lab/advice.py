"""Which settings to start from, for what data, and what is behind each: a published study, or nothing but the default.

A rule here reads results, it does not repeat opinions: the shortest prefix, the shallowest MLP and the plainest start
that the best arm of its study is not ahead of: its 95% interval holds 0, and ends within 0.02 nats per token. Where
something less than the best was not told apart from it either, the study decides nothing, and the recipe stands. The
studies are of one base model and few kinds of data; how far the data at hand is from those is said beside the advice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from prefixkit.config import InitKind, Recipe
from prefixkit.config.unread import unread
from prefixkit.data import PreparedData
from prefixkit.evaluation import heldout_loss
from prefixkit.lab.study.found import FoundArm, FoundStudy
from prefixkit.models import Base

#: Rows the base model reads to be told about the data.
_READ = 48
#: Training rows below which the study of starts, which has 64, speaks of the data at hand.
_FEW = 200
#: Nats per token by which the base model's loss on two kinds of texts differs where they are called unlike here.
_UNLIKE = 1.0
_NO_END = 10_000
#: The studies that vary the length, one for texts to continue, the other for what is asked and answered.
_LENGTHS = ("length", "tasks")
_SUCH_DATA = " on data of this kind"
_DEPTHS = "reparameterisation"
_SEVERAL = "several attributes at once"
#: The study of one prefix for several tasks; its arms that learn both differ in length.
_SHARING, _LEARNS_BOTH = "sharing", "data.learn_also"
#: The lab page's rules of thumb (§8.2): for what, from how many virtual tokens, to how many.
_RULES = (("a simple style", 10, 15), ("complex content", 20, 30), (_SEVERAL, 30, _NO_END))


@dataclass(frozen=True)
class Looked:
    """What there is to learn from.

    Attributes:
        rows: training examples.
        tokens: learned per example, on average.
        loss: of the base model on some of them, nats per learned token; None where labels are learned.
        words: different ones, as a share of all words of those examples.
    """

    rows: int
    tokens: float
    loss: float | None
    words: float


@dataclass(frozen=True)
class Advice:
    """One setting.

    Attributes:
        setting: its path in the recipe.
        value: what to set it to.
        why: in a sentence, with the numbers.
        study: the published study behind it; None where there is none.
    """

    setting: str
    value: Any
    why: str
    study: str | None


def look_at(base: Base, data: PreparedData, on_progress: Callable[[int, int], None] | None = None) -> Looked:
    """Say what there is to learn from: how much, how long, how unlike what the base model would write.

    Args:
        base: the base model, with nothing attached.
        data: the recipe's.
        on_progress: called with the examples read and the examples in all.
    """
    some = data.train[:: max(1, len(data.train) // _READ)][:_READ]
    words = [word for example in some for word in example.text.lower().split()]
    return Looked(
        rows=len(data.train),
        tokens=fmean(example.loss_tokens for example in data.train),
        loss=None if data.classes else heldout_loss(base, some, on_progress=on_progress).mean,
        words=len(set(words)) / max(1, len(words)),
    )


def advise(recipe: Recipe, looked: Looked, found: Sequence[FoundStudy]) -> list[Advice]:
    """Return the settings to start from, in the order one would set them; those its recipe does not read left out.

    Args:
        recipe: whose data was looked at; what it sets is what stays where no study speaks.
        looked: at its data.
        found: published studies.
    """
    start, depth = _start(recipe, looked, found), _depth(recipe, found)
    advice = [_length(recipe, found), *_rate(recipe, found, start.value, depth.value), depth, start]
    return [each for each in advice if unread(recipe, each.setting) is None]


def caveats(recipe: Recipe, looked: Looked, found: Sequence[FoundStudy]) -> list[str]:
    """Return in which ways the data is unlike what the studies were made on.

    Args:
        recipe: as for `advise`.
        looked: likewise.
        found: likewise.
    """
    if not found:
        return ["no study is published yet: everything is a default"]
    study = _of_lengths(recipe, found)
    if study is None:
        return [f"no study of lengths is about such data (data.format={recipe.data.format})"]
    said = [
        f"the studies are of size {study.size}, one base model and few tasks, here {study.recipe}; their rates were "
        "chosen with one seed, for runs as short as that"
    ]
    if looked.loss is not None and study.base_loss is not None and abs(looked.loss - study.base_loss) > _UNLIKE:
        how = "less" if looked.loss < study.base_loss else "more"
        said.append(
            f"the base model is {how} surprised by these texts ({looked.loss:.2f} nats per token) than by the studies' "
            f"({study.base_loss:.2f})"
        )
    if not study.tokens / 3 < looked.tokens < 3 * study.tokens:
        said.append(f"a row teaches {looked.tokens:.0f} tokens, the studies' rows at most {study.tokens}")
    return said


def rules_of_thumb(found: Sequence[FoundStudy]) -> list[str]:
    """Return what the studies say to the lab page's rules of thumb, one line per rule.

    Of several attributes the study of shared prefixes tells, of others those of lengths.
    """
    said = []
    for purpose, low, high in _RULES:
        upper = f"{low}+" if high == _NO_END else f"{low}-{high}"
        if purpose == _SEVERAL:
            within = [
                f"{study.recipe}, {arm.name}: {arm.mean:.3f} nats per token"
                for study in found
                if study.name == _SHARING
                for arm in study.arms
                if _LEARNS_BOTH in arm.settings
            ]
        else:
            within = [
                f"{study.recipe}, {arm.name}, beside the best: {_behind(arm)}"
                for study in found
                if study.name in _LENGTHS
                for arm in study.placed
                if low <= (arm.x or 0) <= high
            ]
        said.append(f"{upper} virtual tokens for {purpose}: {'; '.join(within) or 'not tested'}")
    return said


def _of_lengths(recipe: Recipe, found: Sequence[FoundStudy]) -> FoundStudy | None:
    """Return the study of lengths whose task is of the same kind."""
    kind = str(recipe.data.format)
    return next((study for study in found if study.name in _LENGTHS and study.format == kind and study.placed), None)


def _length(recipe: Recipe, found: Sequence[FoundStudy]) -> Advice:
    study = _of_lengths(recipe, found)
    if study is None:
        return _default(recipe, "prefix.num_virtual_tokens", recipe.prefix.num_virtual_tokens, _SUCH_DATA)
    chosen, why = _least(study, "shortest", lambda arm: arm.x or 0.0)
    if chosen is None:
        return Advice("prefix.num_virtual_tokens", recipe.prefix.num_virtual_tokens, f"what {recipe.name} sets; {why}",
                      None)  # fmt: skip
    return Advice("prefix.num_virtual_tokens", int(chosen.x or 0), why, study.name)


def _least(study: FoundStudy, word: str, size: Callable[[FoundArm], float]) -> tuple[FoundArm | None, str]:
    """Return the arm of least size that does as well as the best of its study's axis, and the words for it.

    None where one of less size than the best was not told apart from it, and may be as good or not.

    Args:
        study: has an axis.
        word: for the least.
        size: of an arm.
    """
    arms = sorted(study.placed, key=size)
    best = min(arms, key=lambda arm: arm.mean)
    chosen = next(arm for arm in arms if arm.is_as_good or arm is best)
    if chosen is not best:
        return chosen, f"the {word} that does as well as the best, {best.name}: {_behind(chosen)}"
    for arm in arms[: arms.index(best)]:
        if arm.behind is None or arm.behind[1] <= 0:
            return None, f"{study.name} does not tell {arm.name} from the best, {best.name}: {_behind(arm)}"
    return best, f"the best of those tried: {best.mean:.3f} nats per token"


def _rate(recipe: Recipe, found: Sequence[FoundStudy], start: str, depth: int) -> list[Advice]:
    """Return the learning rate and what it is counted in, which mean nothing without each other.

    Counted in layers' own sizes, it is no rate for a start that has none. The studies of lengths train keys and values
    themselves: through an MLP the rate is that of the study of depths.
    """
    if depth:
        study, on = _named(_DEPTHS, found, recipe), f" through an MLP of depth {depth}"
        arm = next((each for each in study.placed if _depth_of(each) == depth), None) if study else None
    else:
        study, on = _of_lengths(recipe, found), _SUCH_DATA
        length = _length(recipe, found).value
        arm = next((each for each in study.placed if each.x == length), None) if study else None
    if study is None or arm is None:
        return [_default(recipe, "train.learning_rate", recipe.train.learning_rate, on)]
    if arm.is_scaled and start in (InitKind.RANDOM, InitKind.ZERO):
        return [_default(recipe, "train.learning_rate", recipe.train.learning_rate, f" from a start of kind {start}")]
    why = f"the best on validation rows of those tried for {arm.name}, with one seed"
    units = "what that rate was found in: " + ("each layer's own size" if arm.is_scaled else "the numbers themselves")
    return [
        Advice("train.learning_rate", arm.rates["train.learning_rate"], why, study.name),
        Advice("prefix.init.scaled", arm.is_scaled, units, study.name),
    ]


def _depth(recipe: Recipe, found: Sequence[FoundStudy]) -> Advice:
    study = _named(_DEPTHS, found, recipe)
    if study is None or not study.placed:
        return _default(recipe, "prefix.reparam_depth", recipe.prefix.reparam_depth, _SUCH_DATA)
    chosen, why = _least(study, "shallowest", _depth_of)
    if chosen is None:
        return Advice("prefix.reparam_depth", recipe.prefix.reparam_depth, f"what {recipe.name} sets; {why}", None)
    return Advice("prefix.reparam_depth", _depth_of(chosen), why, _DEPTHS)


def _depth_of(arm: FoundArm) -> int:
    return int(arm.settings["prefix.reparam_depth"])


def _start(recipe: Recipe, looked: Looked, found: Sequence[FoundStudy]) -> Advice:
    study = _named("init", found, recipe)
    if study is None:
        return _default(recipe, "prefix.init.kind", str(recipe.prefix.init.kind), _SUCH_DATA)
    kinds = {str(arm.settings.get("prefix.init.kind", "text")): arm for arm in reversed(study.arms) if arm.is_as_good}
    kind = "text" if "text" in kinds else next(iter(kinds))
    best, worst = (pick(study.arms, key=lambda arm: arm.mean) for pick in (min, max))
    apart = f"{best.name} ends at {best.mean:.3f}, {worst.name} at {worst.mean:.3f}"
    many = f" (with 64 rows; here there are {looked.rows:,})" if looked.rows > _FEW else ""
    return Advice("prefix.init.kind", kind, apart + many, "init")


def _default(recipe: Recipe, setting: str, value: Any, on: str = "") -> Advice:
    return Advice(setting, value, f"what {recipe.name} sets; no published study varies it{on}", None)


def _named(name: str, found: Sequence[FoundStudy], recipe: Recipe) -> FoundStudy | None:
    """Return the study of that name, if it is about data of the recipe's kind."""
    kind = str(recipe.data.format)
    return next((study for study in found if study.name == name and study.format == kind), None)


def _behind(arm: FoundArm) -> str:
    if arm.behind is None:
        return "not compared with it"
    value, low, high = arm.behind
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}] nats per token"
