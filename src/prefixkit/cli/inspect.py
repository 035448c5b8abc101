"""`prefixkit inspect`: can this model take a prefix, and how?"""

import json
from typing import Annotated

import typer


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A packaged model (smollm2-135m; all-minilm-l6-v2 to classify), a folder, a .gguf file, "
            "or a hub id such as gpt2."
        ),
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Virtual tokens to reckon with.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Say whether a model can take a prefix, where, and what a virtual token costs; or why it cannot (exit 1)."""
    from prefixkit.errors import UnsupportedModelError
    from prefixkit.lab.inspection import describe, to_json
    from prefixkit.models.survey import survey_model

    try:
        survey = survey_model(model, revision=revision, num_virtual_tokens=tokens)
    except UnsupportedModelError as refusal:
        if as_json:
            typer.echo(json.dumps({"model": model, "can_take_prefix": False, "reason": str(refusal)}))
        raise
    if as_json:
        typer.echo(json.dumps(to_json(survey)))
        return
    for name, value in describe(survey):
        typer.echo(f"{name:24} {value}")
