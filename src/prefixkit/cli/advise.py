"""`prefixkit advise`: which settings to start from for some data, and what is behind each."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Task(StrEnum):
    """What is to be learned."""

    STYLE = "style"
    ANSWERS = "answers"
    CHAT = "chat"
    LABELS = "labels"


_FORMATS = {Task.STYLE: "text", Task.ANSWERS: "input_target", Task.CHAT: "messages", Task.LABELS: "classes"}


def advise(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe file, or the name of a shipped recipe, whose data to look at.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, such as data.text_column=body.")
    ] = None,
    task: Annotated[Task | None, typer.Option("--task", help="What is to be learned, in place of a recipe.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="A file, a packaged data set or a hub id, in place of a recipe's.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the advice as a recipe to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the advice as JSON.")] = False,
) -> None:
    """Look at data, and say which settings to start from, why, and which study is behind it."""
    from prefixkit.config import Recipe, dump_recipe, load_recipe, parse_recipe
    from prefixkit.errors import ConfigError

    given = list(overrides or ())
    if recipe is not None and "=" in recipe:  # no recipe, only settings
        given, recipe = [recipe, *given], None
    if recipe is None and data is None:
        raise ConfigError("advise: name a recipe, or give --task and --data")
    given = [*([f"data.source={data}"] if data else []), *([f"data.format={_FORMATS[task]}"] if task else []), *given]
    settings: Recipe = parse_recipe("", given) if recipe is None else load_recipe(recipe, given)
    if not settings.method.has_prefix:
        kind = settings.method.kind
        raise ConfigError(f"advise: the studies behind it are of prefixes, and method is {kind}; leave method out")
    if out is not None and out.exists():
        raise ConfigError(f"{out}: exists already; choose another --out")
    from prefixkit.cli.rendering import progress
    from prefixkit.files import write_text
    from prefixkit.lab.advice import advise as find
    from prefixkit.lab.advice import caveats, look_at, rules_of_thumb
    from prefixkit.lab.run.loading import load_for
    from prefixkit.lab.study.found import read_found

    base, prepared = load_for(settings)
    with progress() as report:
        looked = look_at(base, prepared, lambda done, total: report("reading", done, total, ""))
    found = read_found()
    advice = find(settings, looked, found)
    if out is not None:
        chosen = [f"{each.setting}={each.value}" for each in advice if each.study is not None]
        recipe_text = dump_recipe(settings, only_changes=True)
        write_text(out, dump_recipe(parse_recipe(recipe_text, chosen), only_changes=True))
    if as_json:
        said = {"looked": asdict(looked), "advice": [asdict(each) for each in advice]}
        typer.echo(
            json.dumps(said | {"caveats": caveats(settings, looked, found), "rules_of_thumb": rules_of_thumb(found)})
        )
        return
    loss = "" if looked.loss is None else f", {looked.loss:.2f} nats per token for the base model"
    typer.echo(f"{looked.rows:,} training rows of {looked.tokens:.0f} tokens{loss}; {looked.words:.0%} of words differ")
    for each in advice:
        typer.echo(f"{each.setting}={each.value}\n    {each.why} [{each.study or 'no study'}]")
    typer.echo("keep in mind:")
    for words in caveats(settings, looked, found):
        typer.echo(f"    {words}")
    typer.echo("the lab page's rules of thumb:")
    for words in rules_of_thumb(found):
        typer.echo(f"    {words}")
