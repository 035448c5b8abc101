"""`prefixkit generate`: text from a trained prefix."""

import json
from pathlib import Path
from typing import Annotated

import typer


def generate(
    folder: Annotated[Path, typer.Argument(help="A trained run, such as runs/positive-reviews.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to continue or answer; the recipe's if left out.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without separator or chat template.")
    ] = False,
    count: Annotated[int, typer.Option("-n", min=1, help="Texts to generate.")] = 1,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest continuation, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 takes the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this much probability mass.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from this many tokens.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=1, help="Above 1, repeated tokens become less likely.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same texts.")] = 0,
    base: Annotated[bool, typer.Option("--base", help="Also generate without the prefix, to compare.")] = False,
    without: Annotated[
        list[str] | None, typer.Option(help="Turn a part of a hybrid off, such as prefix or lora; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per text.")] = False,
) -> None:
    """Continue a prompt with a trained prefix; a single text streams."""
    from prefixkit.errors import ArtefactError
    from prefixkit.generation import generate_texts, stream_text
    from prefixkit.lab.run.loaded_run import load_run
    from prefixkit.prefix import Prefix

    if Prefix.load(folder).head is not None:  # said before a base model is loaded
        raise ArtefactError(f"{folder}: this artefact learned labels, and writes no text; see `prefixkit classify`")
    run = load_run(folder)
    loaded, prefix = run.base, run.prefix.without(*(without or []))
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
             "repetition_penalty": repetition_penalty}  # fmt: skip
    settings = run.generation(**{key: value for key, value in given.items() if value is not None})
    text, has_encoder = run.prompt(prompt, raw=raw), loaded.start_token_id is not None
    lead = f"{text}\n" if has_encoder else text  # an encoder-decoder answers, it does not continue
    systems = [("prefix", prefix), ("base", None)] if base else [("prefix", prefix)]
    for name, each in systems:
        if base and not as_json:
            typer.secho(f"--- {name}", bold=True)
        if count == 1 and not as_json:
            pieces = stream_text(loaded, text, settings, seed=seed, prefix=each)
            first = next(pieces, "")  # before anything is shown: what is wrong shows itself here
            typer.echo(lead + first, nl=False)
            for piece in pieces:
                typer.echo(piece, nl=False)
            typer.echo()
            continue
        for index, out in enumerate(generate_texts(loaded, [text] * count, settings, seed=seed, prefix=each)):
            line = {"system": name, "index": index, "prompt": text, "text": out}
            typer.echo(json.dumps(line, ensure_ascii=False) if as_json else f"{lead}{out}\n")
