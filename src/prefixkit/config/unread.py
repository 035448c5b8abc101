"""Settings that a recipe has and nothing would read: who asks for one of them meant something else."""

from prefixkit.config.prefix import InitKind
from prefixkit.config.recipe import Recipe
from prefixkit.config.train import OnDivergence

_OF_A_START = {
    "prefix.init.text": InitKind.TEXT, "prefix.init.std": InitKind.RANDOM, "prefix.init.path": InitKind.PREFIX,
}  # fmt: skip
_OF_THE_MLP = {f"prefix.{name}" for name in ("reparam_width", "reparam_activation", "init.orthogonal")}


def unread(recipe: Recipe, setting: str) -> str | None:
    """Say why a setting, such as ``prefix.init.text``, would change nothing in a recipe; None if it would.

    Args:
        recipe: with the setting.
        setting: its path.
    """
    prefix, init = recipe.prefix, recipe.prefix.init
    if (setting, None) in (("prefix.init.text", init.text), ("prefix.init.path", init.path)):
        return None  # taken out, which is always right
    if (refusal := recipe.method.refusal(setting)) is not None:
        return refusal
    reader = _OF_A_START.get(setting)
    if reader is not None and init.kind is not reader:
        return f"is of a start of kind {reader}, and prefix.init.kind is {init.kind}"
    if setting in _OF_THE_MLP and not prefix.reparam_depth:
        return "is of the MLP, and prefix.reparam_depth is 0"
    if setting == "prefix.num_virtual_tokens" and prefix.layer_lengths is not None:
        return "prefix.layer_lengths says how long each layer's is; leave one of the two out"
    if setting == "train.divergence.max_rollbacks" and recipe.train.divergence.action is OnDivergence.STOP:
        return "is of action rollback, and train.divergence.action is stop"
    if setting.startswith("head.") and not recipe.data.format.is_classified:
        return f"is of labels (data.format=classes or tags), and data.format is {recipe.data.format}"
    return None
