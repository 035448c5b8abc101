"""Publish a diagnosis: copy diagnosis.json, draw its pictures, and put what was found into docs/diagnose.md.

prefixkit diagnose runs/positive-reviews
python benchmarks/publish_diagnosis.py runs/positive-reviews
"""

import argparse
import shutil
from pathlib import Path

from prefixkit.files import write_text
from prefixkit.lab.diagnosis.findings import lines
from prefixkit.lab.diagnosis.plots import dilution_plot, heat_map, token_plot
from prefixkit.lab.diagnosis.record import Diagnosis, read_diagnosis
from prefixkit.lab.pages.plots import standalone
from prefixkit.lab.run.folder import DIAGNOSIS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "diagnose.md"
BEGIN, END = "<!-- findings: begin -->", "<!-- findings: end -->"
PICTURES = {"attention-by-layer.svg": heat_map, "attention-by-length.svg": dilution_plot,
            "attention-by-virtual-token.svg": token_plot}  # fmt: skip


def findings_block(found: Diagnosis) -> str:
    """Return what docs/diagnose.md says between its marks."""
    machine = found.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    source = (
        f"Run `{found.name}`, prefix `{found.prefix_hash[:12]}` on {found.base} in {found.dtype}; {found.texts} "
        f"held-out texts of {found.source}; {machine.cores} cores, {machine.cpu}; {versions}."
    )
    return "\n".join([BEGIN, "", *(f"- {line}" for line in lines(found)), "", source, "", END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder that was diagnosed")
    record = parser.parse_args().run / DIAGNOSIS
    found = read_diagnosis(record)
    (place,) = found.placements  # the page speaks of a decoder-only model
    target = RESULTS / found.name
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(record, target / DIAGNOSIS)
    for name, draw in PICTURES.items():
        write_text(target / name, standalone(draw(found, place, name=name.removesuffix(".svg"))))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    write_text(PAGE, before + findings_block(found) + after)


if __name__ == "__main__":
    main()
