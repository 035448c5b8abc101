"""Several processes train one artefact: each reads its share of every batch, and together they do what one does."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import processes
from prefixkit.config import Recipe, dump_recipe
from prefixkit.data import DistributedBatchSampler, LengthGroupedSampler
from prefixkit.errors import ConfigError, TrainingError
from prefixkit.files import read_json
from prefixkit.lab.run.run import train_run
from prefixkit.prefix import Prefix
from prefixkit.processes import join
from prefixkit.training import checkpoint_folder, checkpoints, read_metrics

Make = Callable[..., Recipe]


def train_together(*of_each: Sequence[str], dying: int | None = None) -> list["CompletedProcess[str]"]:
    """Train in processes that find each other as those of torchrun do.

    Args:
        of_each: per process, what follows ``prefixkit train``.
        dying: the one that dies by SIGKILL in step 5.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = str(len(of_each))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}

    def train(rank: int) -> "CompletedProcess[str]":
        own = {} if len(of_each) == 1 else shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        own |= {"PREFIXKIT_TEST_DIES_AT": "5"} if rank == dying else {}
        return processes.run(processes.prefixkit_main, "train", *of_each[rank], "--resume", environ=own)

    with ThreadPoolExecutor(len(of_each)) as pool:
        return list(pool.map(train, range(len(of_each))))


def codes(done: Sequence["CompletedProcess[str]"]) -> list[int]:
    """Return the exit codes."""
    return [each.returncode for each in done]


@pytest.fixture
def write(make_recipe: Make, tmp_path: Path) -> Callable[..., Path]:
    def write(**sections: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        sections["train"] = {"keep_checkpoints": 20} | sections.get("train", {})
        path.write_text(dump_recipe(make_recipe(**sections)), encoding="utf-8")
        return path

    return write


def assert_alike(one: Path, other: Path) -> None:
    """Two runs read the same and learned the same, up to the order of summation."""
    lines, others = (read_metrics(folder / "metrics.jsonl") for folder in (one, other))
    assert [line["step"] for line in lines] == [line["step"] for line in others] == list(range(len(lines)))
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in others]
    for key in ("loss", "grad_norm", "learning_rate", "heldout_loss"):
        found = [line[key] for line in lines if key in line]
        assert len(found) >= 3
        assert found == pytest.approx([line[key] for line in others if key in line], rel=2e-3)
    tensors, others = (load_file(folder / "prefix.safetensors") for folder in (one, other))
    torch.testing.assert_close(tensors, others, rtol=0, atol=2e-3)
    start, end = (load_file(checkpoints(checkpoint_folder(one))[i] / "encoder.safetensors") for i in (0, -1))
    assert (
        max(float((end[name] - start[name]).abs().max()) for name in end if end[name].numel()) > 0.02
    )  # far more than they may differ


#: Methods other than a prefix, at rates that show within 8 steps.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 2, "learning_rate": 0.01},
    "adapter": {"kind": "adapter", "bottleneck": 3, "learning_rate": 0.01},
    "bitfit": {"kind": "bitfit", "learning_rate": 0.01},
    "full": {"kind": "full", "learning_rate": 0.01},
    "prefix+lora": {"kind": "lora", "beside_prefix": True, "rank": 2, "learning_rate": 0.01},
    "prompt-tuning": {"kind": "prompt-tuning", "learning_rate": 0.05},
}


@pytest.mark.parametrize(
    ("count", "sections"),
    [
        (2, {"train": {"batch_size": 4, "accumulation": 2}, "data": {"likeliest": 0.5}}),
        (3, {"train": {"batch_size": 4, "steps": 26}}),  # shares of two rows and one, and none of the short last batch
        pytest.param(2, {"train": {"batch_size": 4}, "data": {"stream": True, "stream_head": 120, "stream_window": 16}},
                     marks=pytest.mark.slow),
        (2, {"model": {"shard": True}, "train": {"batch_size": 4, "gradient_checkpointing": True},
             "data": {"likeliest": 0.5}, "evaluation": {"samples": 3}, "generation": {"max_new_tokens": 4}}),
        pytest.param(2, {"model": {"shard": True}, "train": {"batch_size": 4, "patience": 1, "evaluate_every": 1},
                         "data": {"stream": True, "stream_head": 120, "stream_window": 16}}, marks=pytest.mark.slow),
        pytest.param(2, {"model": {"shard": True}, "train": {"batch_size": 5}, "head": {"dropout": 0.0},
                         "data": {"format": "classes", "keep_label": None, "prompt": ""}}, marks=pytest.mark.slow),
        (2, {"train": {"batch_size": 5, "gradient_checkpointing": True}, "head": {"dropout": 0.0},
             "data": {"format": "classes", "keep_label": None, "prompt": ""}}),
        (2, {"train": {"batch_size": 4, "accumulation": 2}, "method": METHODS["lora"]}),
        pytest.param(2, {"train": {"batch_size": 4}, "method": METHODS["full"]}, marks=pytest.mark.slow),
        pytest.param(3, {"train": {"batch_size": 4, "gradient_checkpointing": True}, "method": METHODS["adapter"]},
                     marks=pytest.mark.slow),
        pytest.param(2, {"train": {"batch_size": 4}, "method": METHODS["bitfit"]}, marks=pytest.mark.slow),
        pytest.param(2, {"train": {"batch_size": 4}, "method": METHODS["prefix+lora"]}, marks=pytest.mark.slow),
        pytest.param(2, {"train": {"batch_size": 4}, "method": METHODS["prompt-tuning"]}, marks=pytest.mark.slow),
        pytest.param(2, {"train": {"batch_size": 4}, "prefix": {"layers": [0], "num_virtual_tokens": 4, "gate": True}},
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_processes_together_do_what_one_does_alone(
    count: int, sections: dict[str, Any], write: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = str(write(**sections))
    folders = [tmp_path / "one", tmp_path / "many"]
    for number, folder in zip((1, count), folders, strict=True):
        for done in train_together(*[(recipe, "--out", str(folder))] * number):
            assert done.returncode == 0, done.stderr
    assert_alike(*folders)
    records = [read_json(folder / "run.json") for folder in folders]
    assert [record["processes"] for record in records] == [1, count]
    assert [record["sharded"] for record in records] == [False, bool(sections.get("model", {}).get("shard"))]
    assert records[0]["base_weights_hash"] == records[1]["base_weights_hash"]
    assert records[0]["tokens"] == records[1]["tokens"]
    assert (folders[1] / "report.html").is_file()


@pytest.mark.parametrize(
    ("dying", "sections"),
    [
        pytest.param(0, {}, marks=pytest.mark.slow),
        (1, {}),
        pytest.param(1, {"model": {"shard": True}}, marks=pytest.mark.slow),
        *(
            pytest.param(1, {"method": METHODS[name]}, marks=pytest.mark.slow)
            for name in ("lora", "adapter", "bitfit", "full")
        ),
    ],
)
def test_when_one_dies_the_run_goes_on_from_its_checkpoint_to_the_same_end(
    dying: int, sections: dict[str, Any], write: Callable[..., Path], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    recipe = str(write(**sections))
    together = {folder: [(recipe, "--out", str(folder))] * 2 for folder in (whole, killed)}
    assert codes(train_together(*together[whole])) == [0, 0]
    ends = codes(train_together(*together[killed], dying=dying))
    assert ends[dying] == -9
    assert ends[1 - dying] != 0  # it has nobody to talk to
    assert codes(train_together(*together[killed])) == [0, 0]
    assert Prefix.load(killed).card.content_hash == Prefix.load(whole).card.content_hash
    timeless = [[{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder / "metrics.jsonl")]
                for folder in (whole, killed)]  # fmt: skip
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(
    before: int, after: int, write: Callable[..., Path], tmp_path: Path
) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    recipe = str(write())
    assert codes(train_together((recipe, "--out", str(whole)))) == [0]
    assert codes(train_together(*[(recipe, "--out", str(moved))] * before, dying=0))[0] == -9
    assert codes(train_together(*[(recipe, "--out", str(moved))] * after)) == [0] * after
    assert_alike(whole, moved)
    assert read_json(moved / "run.json")["processes"] == after


def test_a_process_that_does_not_find_the_others_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(**_: Any) -> None:
        raise torch.distributed.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr("accelerate.PartialState", lost)
    for name, value in {"WORLD_SIZE": "3", "RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match="^process 2 of 3 did not find the others; see what the first one says$"):
        join()


def test_more_processes_than_rows_in_a_batch_are_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    together = [(str(write(train={"batch_size": 1})), "--out", str(tmp_path / "run"))] * 2
    for done in train_together(*together):
        assert done.returncode == 1
        assert "train.batch_size: 2 processes cannot share batches of 1; raise it, or start at most 1" in done.stderr
    assert not (tmp_path / "run").exists()


def test_processes_that_loaded_other_data_or_see_another_folder_are_refused(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = str(write())
    here, there = (str(tmp_path / name) for name in ("here", "there"))
    for done in train_together((recipe, "--out", here), (recipe, "data.min_words=6", "--out", here)):
        assert done.returncode == 1
        assert "the processes of this run loaded different data or base models; give all the same files" in done.stderr
    assert not Path(here).exists()
    refused = train_together((recipe, "--out", here), (recipe, "--out", there))
    for folder, done in zip((here, there), refused, strict=True):
        assert done.returncode == 1
        assert f"{folder}: not all processes of this run see it; give --out on a disk that all machines" in done.stderr


@pytest.mark.parametrize(
    ("command", "what"), [(["sweep", "positive-reviews"], "a sweep starts its own processes"),
                          (["evaluate", "runs/tiny"], "measuring a run takes one process")],
)  # fmt: skip
def test_what_takes_one_process_says_so(command: list[str], what: str, make_recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "recipe.yaml").write_text(dump_recipe(make_recipe()), encoding="utf-8")
    done = processes.run(processes.prefixkit_main, *command, cwd=tmp_path, environ={"WORLD_SIZE": "2", "RANK": "0"})
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: {what}; start it without torchrun or accelerate launch"


def test_shares_of_every_batch_are_the_whole_batch() -> None:
    order = LengthGroupedSampler([3, 5, 1, 8, 2, 2, 9, 4, 7], 4, seed=0)
    order.set_epoch(3)
    whole = list(DistributedBatchSampler(order))
    assert [len(batch) for batch in whole] == [4, 4, 1]
    shares = [list(DistributedBatchSampler(order, rank=rank, num_replicas=3)) for rank in range(3)]
    for step, batch in enumerate(whole):
        rows = [row for share in shares for row in share[step] if row != DistributedBatchSampler.IDLE]
        assert sorted(rows) == sorted(batch)
    assert [share[2] for share in shares[1:]] == [[DistributedBatchSampler.IDLE]] * 2
    with pytest.raises(ConfigError, match="5 processes cannot share batches of 4"):
        DistributedBatchSampler(order, num_replicas=5)


@pytest.mark.slow
def test_torchrun_runs_a_recipe(write: Callable[..., Path], tmp_path: Path) -> None:
    recipe = str(write())
    assert codes(train_together((recipe, "--out", str(tmp_path / "alone")))) == [0]
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*starter, "-m", "prefixkit", "train", recipe, "--out", str(tmp_path / "many"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == str(tmp_path / "many")  # said once
    assert_alike(tmp_path / "alone", tmp_path / "many")


def test_a_budget_is_for_a_whole_base_model(make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--memory-budget measures a whole base model; leave it out, or set model.s"):
        train_run(make_recipe(model={"shard": True}), tmp_path / "run", memory_budget=10**9, report=lambda *_: None)
    assert not (tmp_path / "run").exists()
