"""Run the notebooks on fresh kernels, from top to bottom, and save what they showed.

    .venv/bin/python notebooks/execute.py                    # all of them
    .venv/bin/python notebooks/execute.py 02-Train           # one
    .venv/bin/python notebooks/execute.py --record           # all of them, trained anew, and how long each took

The .ipynb files are the sources, a line of text to a line of the file, and are edited in Jupyter. (Pairing them with
text files by jupytext would keep everything twice.) Another language's edition, in a folder of its own, has text of its
own and takes its code cells, with their outputs, from the English edition of the same name, cell by cell.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from prefixkit.files import write_json, write_text
from prefixkit.models.hardware import describe_machine

FOLDER = Path(__file__).parent
RUNS = FOLDER / "runs"
RECORD = FOLDER.parent / "docs" / "results" / "notebooks.json"
EDITIONS = ("zh-TW",)
#: What a notebook says about where it ran: nothing that differs between machines.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
TIMEOUT_S = 1800

Json = dict[str, Any]


def read(path: Path) -> Json:
    """Read a notebook."""
    notebook: Json = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def write(path: Path, notebook: Mapping[str, Any]) -> None:
    """Write a notebook as Jupyter does, letters of all languages as they are."""
    write_text(path, json.dumps(notebook, ensure_ascii=False, indent=1) + "\n")


def execute(path: Path) -> float:
    """Run a notebook on a fresh kernel in its own folder, save its outputs, and return the seconds it took."""
    notebook = nbformat.read(path, as_version=4)
    began = time.perf_counter()
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=TIMEOUT_S, resources=resources, coalesce_streams=True).execute()
    seconds = time.perf_counter() - began
    found = json.loads(nbformat.writes(notebook))
    write(path, found | {"cells": [tidied(cell) for cell in found["cells"]], "metadata": METADATA})
    return seconds


def tidied(cell: Json) -> Json:
    """Return a cell without the times it ran at, and where it has pictures, with them and what it printed alone."""
    outputs = cell.get("outputs", [])
    if any(_is_picture(output) for output in outputs):  # then the words are what matplotlib's last call returned
        outputs = [_without_words(output) for output in outputs if _is_picture(output) or "data" not in output]
    return cell | {"metadata": {}} | ({"outputs": outputs} if cell["cell_type"] == "code" else {})


def _is_picture(output: Json) -> bool:
    return "image/svg+xml" in output.get("data", {})


def _without_words(output: Json) -> Json:
    if not _is_picture(output):
        return output
    return output | {"data": {"image/svg+xml": output["data"]["image/svg+xml"]}, "metadata": {}}


def with_code_of(original: Json, edition: Json) -> Json:
    """Return another language's edition with the code and outputs of the English one.

    Raises:
        ValueError: the two have other cells, or in another order.
    """
    ids = [[(cell["id"], cell["cell_type"]) for cell in each["cells"]] for each in (original, edition)]
    if ids[0] != ids[1]:
        odd = next((pair for pair in zip(*ids, strict=False) if pair[0] != pair[1]), (ids[0][-1], ids[1][-1]))
        raise ValueError(f"the editions differ in their cells: {odd[0][0]} against {odd[1][0]}")
    pairs = zip(original["cells"], edition["cells"], strict=True)
    return original | {"cells": [own if own["cell_type"] == "markdown" else code for code, own in pairs]}


def share(path: Path) -> list[Path]:
    """Hand a notebook's code and outputs to its editions in other languages; returns those there are."""
    found = [FOLDER / edition / path.name for edition in EDITIONS if (FOLDER / edition / path.name).is_file()]
    for edition in found:
        write(edition, with_code_of(read(path), read(edition)))
    return found


def main(names: Sequence[str], *, is_recorded: bool) -> int:
    """Run the notebooks of these names, all if there are none; returns the exit status."""
    paths = [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb"))
    took: dict[str, float] = {}
    if is_recorded and RUNS.exists():  # what is trained already takes no time
        shutil.rmtree(RUNS)
    for path in paths:
        try:
            seconds = execute(path)
        except CellExecutionError as error:
            print(f"{path.stem}: {error}", file=sys.stderr)
            return 1
        print(f"{path.stem}: {seconds:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)
        share(path)
        took[path.stem] = round(seconds, 1)
    if is_recorded:
        write_json(RECORD, {"machine": asdict(describe_machine()), "seconds": took})
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="such as 02-Train; all of them if left out")
    parser.add_argument("--record", action="store_true", help="train anew, and write the seconds to docs/results")
    asked = parser.parse_args()
    sys.exit(main(asked.names, is_recorded=asked.record))
