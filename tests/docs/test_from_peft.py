"""The page for people who come from PEFT is run, both sides and in order, so that it stays true."""

import re
import shlex
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import processes
from conformance.encoder_families import ENCODER_DECODERS, build
from prefixkit import Prefix, attach

PAGE = Path(__file__).parents[2] / "docs" / "from-peft.md"
BLOCK = re.compile(r"^```(python \w+)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def tiny_t5_dir(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    family, settings = ENCODER_DECODERS["t5"]
    build((family, settings | {"vocab_size": len(tiny_tokenizer)})).float().save_pretrained(tmp_path / "tiny t5")
    return tmp_path / "tiny t5"


def test_every_block_of_the_page_runs_and_both_sides_agree(
    tiny_gpt2_dir: Path,
    tiny_t5_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    sides: dict[str, dict[str, Any]] = {"peft": {}, "prefixkit": {}}
    seen: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
            if not kind:
                for line in text.replace("runs/positive-reviews", "imported").splitlines():
                    arguments = shlex.split(line.replace("gpt2", shlex.quote(str(tiny_gpt2_dir))))
                    assert arguments[0] == "prefixkit"
                    done = processes.prefixkit(*arguments[1:])
                    assert done.returncode == 0, done.stderr
                    seen.append(" ".join(arguments[:2]))
                continue
            side = kind.removeprefix("python ")
            here = text.replace('"gpt2"', repr(str(tiny_gpt2_dir))).replace('"t5-small"', repr(str(tiny_t5_dir)))
            code = compile(here, f"{PAGE.name}: {side}", "exec")
            for name in sides if side == "both" else [side]:
                exec(code, sides[name])
            seen.append(side)
    assert seen.count("peft") >= 3
    assert seen.count("prefixkit") >= 5
    assert {"prefixkit import", "prefixkit generate", "prefixkit export"} <= set(seen)
    assert capsys.readouterr().out.count("trainable params: ") == 2

    theirs, ours = sides["peft"], sides["prefixkit"]
    # float32, and one token at a time or all at once: rounding only.
    torch.testing.assert_close(theirs["in_peft"], ours["in_prefixkit"], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(list(ours["said"].values())), theirs["said_in_peft"], rtol=0, atol=1e-5)
    written = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft-prefix", "for-peft")]
    assert torch.equal(written[0]["prompt_embeddings"], written[1]["prompt_embeddings"])
    assert written[0]["prompt_embeddings"].shape == (20, 2 * 2 * 32)
    with attach(ours["lora"], Prefix.load(tmp_path / "prefix-beside-lora")):
        ours["lora"](**ours["question"])


def test_the_two_sides_of_a_table_differ_in_the_import_and_the_folders_alone() -> None:
    blocks = [(kind, text) for kind, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if kind]
    pairs = [
        (left[1], right[1])
        for left, right in pairwise(blocks)
        if left[0] == "python peft" and right[0] == "python prefixkit"
    ]
    alike = [pairs[0], pairs[1], pairs[3]]
    for left, right in alike:
        renamed = left.replace("from peft import", "from prefixkit.peft import").replace('"peft-', '"our-')
        assert renamed == right
    assert "SEQ_2_SEQ_LM" in alike[2][0]
