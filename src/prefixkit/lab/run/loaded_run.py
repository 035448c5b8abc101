"""A trained run, or any artefact, ready to be used: its base model, its prefix, and how both are meant to be asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefixkit.classification import ClassifiedText, classify
from prefixkit.config import GenerationConfig, Recipe, validate_recipe
from prefixkit.data import ask
from prefixkit.errors import ArtefactError, DataError
from prefixkit.generation import generate_texts
from prefixkit.lab.run.folder import RECIPE, read_recipe
from prefixkit.models import Base, load_base_model
from prefixkit.models.hardware import prepare_processor
from prefixkit.models.sources import hub_revision
from prefixkit.prefix import Prefix


class LoadedRun(NamedTuple):
    """What is needed to use a run.

    Attributes:
        base: the frozen base model it was trained on, with nothing attached.
        prefix: the artefact.
        recipe: how it was trained, and how it generates; the defaults for one that was imported.
    """

    base: Base
    prefix: Prefix
    recipe: Recipe

    def generate(
        self, prompts: Sequence[str] | None = None, *, seed: int = 0, raw: bool = False, **settings: Any
    ) -> list[str]:
        """Continue prompts, or answer them, as `prefixkit generate` does.

        Args:
            prompts: one per text; left out, the recipe's own, once.
            seed: the same seed gives the same texts.
            raw: take prompts as they are; otherwise they are put as the prefix met their like in training, behind the
                separator or as a user's turn.
            settings: of the generation, in place of the recipe's, such as ``max_new_tokens=40``.

        Raises:
            ArtefactError: the run learned labels, and writes no text.
            ConfigError: a setting is unknown or out of range.
            DataError: as for `generate_texts`.
        """
        if isinstance(prompts, str):
            raise DataError("prompts: expected a list of prompts, got one text; write [prompt]")
        asked = [self.prompt(prompt, raw=raw) for prompt in ([None] if prompts is None else prompts)]
        return generate_texts(self.base, asked, self.generation(**settings), seed=seed, prefix=self.prefix)

    def classify(self, texts: Sequence[str]) -> list[ClassifiedText]:
        """Label texts, as `prefixkit classify` does.

        Raises:
            ArtefactError: the run learned no labels, or labels of words.
            DataError: a text cannot be read.
        """
        return classify(self.base, texts, self.prefix)

    def prompt(self, prompt: str | None, *, raw: bool = False) -> str:
        """Return a prompt as `generate` puts it; None is the recipe's own.

        Raises:
            ArtefactError: the run learned labels, and writes no text.
        """
        if self.prefix.head is not None:
            raise ArtefactError("this artefact learned labels, and writes no text; classify() gives them")
        if prompt is None:
            return self.recipe.data.prompt
        has_encoder = self.base.start_token_id is not None
        return prompt if raw else ask(prompt, self.recipe.data, self.base.tokenizer, has_encoder=has_encoder)

    def generation(self, **settings: Any) -> GenerationConfig:
        """Return the recipe's settings of the generation, with some in place of its own.

        Raises:
            ConfigError: a setting is unknown or out of range.
        """
        values = self.recipe.model_dump(mode="json")
        return validate_recipe(values | {"generation": values["generation"] | settings}).generation


def load_run(folder: str | Path) -> LoadedRun:
    """Load what is needed to use a run, an artefact that a run left, or one that was imported.

    The processor is prepared as for a run: torch gets as many threads as the recipe says, or as there are cores.

    Raises:
        ArtefactError: the folder is no artefact that knows its recipe, or the base model it names is another by now.
        ModelError: the base model cannot be loaded.
    """
    prefix = Prefix.load(folder)
    recipe = _recipe_of(Path(folder), prefix)
    prepare_processor(recipe.train.threads)
    model = recipe.model
    base = load_base_model(model.base, revision=model.revision, dtype=model.dtype, attention=model.attention)
    return LoadedRun(base, prefix, recipe)


def _recipe_of(folder: Path, prefix: Prefix) -> Recipe:
    if (folder / RECIPE).is_file():
        return read_recipe(folder)
    if prefix.card.training is not None:
        return validate_recipe(prefix.card.training.recipe)
    base = prefix.card.base  # a prefix that was imported, or made by hand: all that is known is its base model
    return validate_recipe({"model": {"base": base.id, "revision": hub_revision(base.id, base.revision)}})
