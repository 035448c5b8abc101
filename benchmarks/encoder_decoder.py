r"""An encoder-decoder trained from scratch on real text, frozen, and then steered by a prefix to a task it never saw.

    python benchmarks/encoder_decoder.py --e2e e2e_train.jsonl.gz --e2e-dev e2e_dev.jsonl.gz \
        --webnlg webnlg_train.jsonl.gz

First a small T5 learns from E2E and WebNLG texts to restore words left out of them, to turn WebNLG's triples into
text, and to turn E2E's texts into meaning representations. The opposite direction, from E2E's meaning representations
to text, is kept from it. Then it is frozen, and the recipe `e2e-t5-small` trains a prefix on that direction through
`train_run`, the library's own way, once with prefixes in all three attentions and once in the decoder's self-attention
alone (what PEFT offers). Files are lines of JSON: mr and ref; triples and refs.
"""

import argparse
import gzip
import json
import random
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration, get_scheduler

from prefixkit.config import GenerationConfig, load_recipe
from prefixkit.data import NO_LOSS
from prefixkit.errors import PrefixkitError
from prefixkit.files import read_json, write_json
from prefixkit.generation import generate_texts
from prefixkit.lab.run.loaded_run import load_run
from prefixkit.lab.run.run import train_run
from prefixkit.models.hardware import choose_threads, describe_machine
from prefixkit.seeding import derive

SPECIAL = ["<pad>", "</s>", "<unk>", "<mask>"]
SIZES = {"d_model": 192, "d_kv": 32, "d_ff": 512, "num_heads": 6, "num_layers": 3, "dropout_rate": 0.0}
PLACEMENTS = {"all three attentions": None, "decoder self-attention only": ["decoder_self"]}
GREEDY = GenerationConfig(temperature=0, max_new_tokens=60, batch_size=32)
Pair = tuple[str, str]


def read(path: Path) -> list[dict[str, Any]]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.splitlines()]


def corrupt(text: str, dice: random.Random) -> Pair:
    """Leave out three runs of words."""
    words = text.split()
    kept = list(words)
    for _ in range(3):
        start = dice.randrange(len(words))
        for place in range(start, min(start + 3, len(words))):
            kept[place] = "<mask>"
    return "fill: " + " ".join(kept), text


def lessons(e2e: list[dict[str, Any]], webnlg: list[dict[str, Any]], dice: random.Random) -> Iterator[Pair]:
    """Yield pairs of the three tasks of the base model, for ever."""
    texts = [row["ref"] for row in e2e] + [ref for row in webnlg for ref in row["refs"]]
    while True:
        yield corrupt(dice.choice(texts), dice)
        facts = dice.choice(webnlg)
        yield "triples: " + " ; ".join(" | ".join(triple) for triple in facts["triples"]), dice.choice(facts["refs"])
        row = dice.choice(e2e)
        yield "parse: " + row["ref"], row["mr"]


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>"
    )


def train_base(folder: Path, e2e: list[dict[str, Any]], webnlg: list[dict[str, Any]], steps: int) -> list[float]:
    """Train the base model from scratch and save it; returns its loss, averaged over every hundred steps."""
    texts = [part for row in e2e for part in (row["ref"], row["mr"])]
    texts += [ref for row in webnlg for ref in row["refs"]] + ["fill: triples: parse: |"] * 100
    tokenizer = build_tokenizer(texts)
    with torch.random.fork_rng():
        torch.manual_seed(derive(0, "benchmark.base"))
        config = T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
                          decoder_start_token_id=0, **SIZES)  # fmt: skip
        model = T5ForConditionalGeneration(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = get_scheduler("cosine", optimiser, steps // 20, steps)
    pairs, curve, total = lessons(e2e, webnlg, random.Random(0)), [], 0.0
    for step in range(1, steps + 1):
        batch = [next(pairs) for _ in range(30)]
        source = tokenizer(
            [pair[0] for pair in batch], return_tensors="pt", padding=True, truncation=True, max_length=96
        )
        target = tokenizer(
            [pair[1] for pair in batch], return_tensors="pt", padding=True, truncation=True, max_length=96
        )
        labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, NO_LOSS)
        loss = model(input_ids=source["input_ids"], attention_mask=source["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        scheduler.step()
        optimiser.zero_grad()
        total += float(loss.detach())
        if step % 100 == 0:
            curve.append(total / 100)
            total = 0.0
            say(f"base model: step {step} of {steps}, loss {curve[-1]:.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return curve


def bleu(base: Any, prefix: Any, references: dict[str, list[str]]) -> dict[str, Any]:
    """Return the multi-reference BLEU of greedy texts, and the first few of them."""
    inputs = list(references)
    texts = generate_texts(base, inputs, GREEDY, seed=0, prefix=prefix)
    most = max(map(len, references.values()))
    streams = [[refs[i] if i < len(refs) else None for refs in references.values()] for i in range(most)]
    score = sacrebleu.corpus_bleu(texts, streams)
    shown = [{"mr": mr, "text": text} for mr, text in list(zip(inputs, texts, strict=True))[:5]]
    return {"bleu": score.score, "meaning_representations": len(inputs), "samples": shown}


def run_prefix(name: str, work: Path, pairs: Path, steps: int, references: dict[str, list[str]]) -> dict[str, Any]:
    overrides = [
        f"model.base={work / 'base'}", "model.dtype=float32", f"data.source={pairs}", "data.input_column=mr",
        "data.target_column=ref", f"train.steps={steps}", "train.batch_size=32", "train.evaluate_every=50",
        "evaluation.samples=0", f"prefix.placement={json.dumps(PLACEMENTS[name])}",
    ]  # fmt: skip
    recipe = load_recipe("e2e-t5-small", overrides)
    run = train_run(recipe, work / name.replace(" ", "-"), overwrite=True, report=lambda *_: None)
    base, prefix, _ = load_run(run.folder)
    scores = read_json(run.folder / "scores.json")
    keys = ("heldout_nll", "heldout_nll.low", "heldout_nll.high", "base.heldout_nll", "trainable_parameters")
    record = read_json(run.folder / "run.json")
    return {
        "scores": {key: scores[key] for key in keys if key in scores},
        "base_weights_hash": record["base_weights_hash"],
        "recipe": _without_paths(recipe.model_dump(mode="json")),
        "with_prefix": bleu(base, prefix, references),
        "without": bleu(base, None, references),
    }


def _without_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """The base model and the rows are this benchmark's own; where they lay is nobody's business."""
    recipe["model"]["base"], recipe["data"]["source"] = "base", Path(recipe["data"]["source"]).name
    return recipe


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--e2e", type=Path, required=True)
    parser.add_argument("--e2e-dev", type=Path, required=True)
    parser.add_argument("--webnlg", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/encoder-decoder"), help="base model and runs go here")
    parser.add_argument("--base-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=400, help="steps of each prefix")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "encoder_decoder.json")
    arguments = parser.parse_args()
    torch.set_num_threads(choose_threads(arguments.threads))
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    e2e, webnlg = read(arguments.e2e), read(arguments.webnlg)
    if not (work / "base.json").is_file():
        shutil.rmtree(work / "base", ignore_errors=True)
        curve = train_base(work / "base", e2e, webnlg, arguments.base_steps)
        write_json(work / "base.json", {"steps": arguments.base_steps, "loss": curve, "sizes": SIZES})
    pairs = work / "e2e.jsonl"
    pairs.write_text("\n".join(json.dumps({"mr": row["mr"], "ref": row["ref"]}) for row in e2e), encoding="utf-8")
    references: dict[str, list[str]] = defaultdict(list)
    for row in read(arguments.e2e_dev):
        references[row["mr"]].append(row["ref"])
    chosen = dict(list(references.items())[:100])
    result: dict[str, Any] = {
        "benchmark": "encoder_decoder",
        "machine": asdict(describe_machine()),
        "threads": torch.get_num_threads(),
        "base": read_json(work / "base.json"),
        "prefixes": {},
    }
    for name in PLACEMENTS:
        say(f"prefix in {name}")
        result["prefixes"][name] = run_prefix(name, work, pairs, arguments.steps, chosen)
        write_json(arguments.out, result)
        found = result["prefixes"][name]
        say(f"  held-out loss {found['scores']['heldout_nll']:.3f} (base {found['scores']['base.heldout_nll']:.3f}), "
            f"BLEU {found['with_prefix']['bleu']:.1f} (base {found['without']['bleu']:.1f})")  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except PrefixkitError as error:
        sys.exit(str(error))
