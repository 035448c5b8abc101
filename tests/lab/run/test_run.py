"""A run from recipe to report: what is refused, when, and that nothing is lost by it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefixkit.config import Recipe, validate_recipe
from prefixkit.errors import ArtefactError, ConfigError, DataError, DivergedError, ModelError, TrainingError
from prefixkit.files import read_json, write_json
from prefixkit.lab.run.folder import check_run, is_measured, locked, open_run, read_recipe
from prefixkit.lab.run.loaded_run import load_run
from prefixkit.lab.run.loading import load_for
from prefixkit.lab.run.run import Run, evaluate_run, train_run
from prefixkit.prefix import Prefix
from prefixkit.training import build_encoder, checkpoint_folder, checkpoints
from prefixkit.training.checkpoint import newest_readable
from prefixkit.training.model import PrefixModel

from ..conftest import quiet, write_reviews


def change(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    values = recipe.model_dump(mode="json")
    for name, changes in sections.items():
        values[name] |= changes
    return validate_recipe(values)


class Killed(Exception):
    """What stands for SIGKILL here: nothing takes it."""


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("depth", [0, 2])
def test_the_encoder_a_run_leaves_is_the_one_its_prefix_came_from(run: Run, tmp_path: Path, depth: int) -> None:
    large = Prefix.from_states(run.prefix.states.map(lambda tensor: 8 * tensor), base=run.prefix.card.base)
    large.save(tmp_path / "large")
    start = {"kind": "prefix", "path": str(tmp_path / "large"), "scaled": True}
    prefix = {"reparam_depth": depth, "reparam_width": 8, "init": start}
    scaled = change(read_recipe(run.folder), prefix=prefix, evaluation={"samples": 0})
    run = train_run(scaled, tmp_path / "again", report=quiet)
    base, _ = load_for(scaled)
    encoder = build_encoder(base, scaled.prefix, seed=1, texts=["another start"])
    PrefixModel(base.model, encoder, None).load_trained_state(load_file(run.folder / "training/encoder.safetensors"))
    assert (encoder.units > 1).all()
    for made, saved in zip(encoder.materialise().sites, run.prefix.states.sites, strict=True):
        assert torch.equal(made.key, saved.key)
        assert torch.equal(made.value, saved.value)


def test_overwriting_removes_the_old_run_and_trains_again(run: Run, recipe: Recipe) -> None:
    again = train_run(change(recipe, train={"seed": 1}), run.folder, overwrite=True, report=quiet)
    assert again.prefix.card.content_hash != run.prefix.card.content_hash
    assert read_json(run.folder / "run.json")["seed"] == 1


def test_overwriting_spares_whatever_is_no_run(run: Run, recipe: Recipe) -> None:
    (run.folder / "thesis.txt").write_text("years of work")
    before = content(run.folder)
    with pytest.raises(TrainingError, match=r"is not a run folder, it holds thesis.txt; not overwriting it"):
        train_run(recipe, run.folder, overwrite=True, report=quiet)
    (run.folder / "thesis.txt").unlink()
    (run.folder / "recipe.yaml").unlink()
    with pytest.raises(TrainingError, match=r"is not a run folder, it has no recipe.yaml; not overwriting it"):
        train_run(recipe, run.folder, overwrite=True, report=quiet)
    before.pop("thesis.txt"), before.pop("recipe.yaml")
    assert content(run.folder) == before


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"data": {"source": "missing.csv"}}, DataError, "missing.csv: no such file"),
        ({"model": {"base": "./nowhere"}}, ModelError, "nowhere"),
        ({"train": {"report_to": ["foo"]}}, ConfigError, "train.report_to: foo is not supported, only"),
        (
            {"generation": {"max_new_tokens": 5000}},
            DataError,
            r"prompt \d+ \+ 5000 new tokens exceed the model's context",
        ),
    ],
)
def test_what_cannot_be_loaded_costs_no_run_and_no_name(
    run: Run, recipe: Recipe, tmp_path: Path, sections: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = content(run.folder)
    with pytest.raises(error, match=message):
        train_run(change(recipe, **sections), run.folder, overwrite=True, report=quiet)
    assert content(run.folder) == before
    with pytest.raises(error, match=message):
        train_run(change(recipe, **sections), tmp_path / "new", report=quiet)
    assert not (tmp_path / "new").exists()


def test_resuming_and_overwriting_exclude_each_other(run: Run, recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="--resume keeps the run and --overwrite throws it away; give one of them"):
        check_run(run.folder, recipe, resume=True, overwrite=True)


def test_a_finished_run_is_measured_again_only_with_other_settings(run: Run, recipe: Recipe) -> None:
    before = content(run.folder)
    assert train_run(recipe, run.folder, resume=True, report=quiet).scores == run.scores
    assert content(run.folder) == before
    train_run(change(recipe, evaluation={"samples": 3}), run.folder, resume=True, report=quiet)
    assert len((run.folder / "samples.jsonl").read_text().splitlines()) == 3 * 3
    assert read_json(run.folder / "run.json")["content_hash"] == run.prefix.card.content_hash


def test_scores_from_before_a_setting_was_there_still_count(run: Run, recipe: Recipe) -> None:
    scores = read_json(run.folder / "scores.json")
    del scores["measured_with"]["evaluation"]["baselines"]
    write_json(run.folder / "scores.json", scores)
    before = (run.folder / "scores.json").stat().st_mtime_ns
    train_run(recipe, run.folder, resume=True, report=quiet)
    assert (run.folder / "scores.json").stat().st_mtime_ns == before


def test_a_run_that_diverged_says_so_in_its_record(recipe: Recipe, tmp_path: Path) -> None:
    wild = change(recipe, train={"learning_rate": 1e9, "divergence": {"action": "stop"}})
    with pytest.raises(DivergedError) as caught:
        train_run(wild, tmp_path / "wild", report=quiet)
    assert read_json(tmp_path / "wild" / "run.json")["diverged"] == str(caught.value)


def test_the_report_names_the_settings_the_scores_were_made_with(run: Run, recipe: Recipe) -> None:
    evaluate_run(run.folder, change(recipe, evaluation={"instruction": "say yes"}), report=quiet)
    assert read_json(run.folder / "scores.json")["measured_with"]["evaluation"]["instruction"] == "say yes"
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "say yes" in page
    assert "be kind" not in page


def test_a_run_is_not_measured_on_other_data_than_it_was_trained_with(run: Run, recipe: Recipe, reviews: Path) -> None:
    before = content(run.folder)
    write_reviews(reviews, last_word=" changed")
    with pytest.raises(TrainingError, match="the data changed since this run was started; start another run"):
        evaluate_run(run.folder, recipe, report=quiet)
    assert content(run.folder) == before


def test_resuming_an_unfinished_run_needs_the_same_data_and_base(
    run: Run, recipe: Recipe, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.folder / "scores.json").unlink()
    monkeypatch.setattr("prefixkit.lab.run.agreement.weights_hash", lambda model: "another")
    with pytest.raises(TrainingError, match="the base model changed since this run was started; start another run"):
        train_run(recipe, run.folder, resume=True, report=quiet)


@pytest.mark.parametrize("name", ["run.json", "scores.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_record_is_named(run: Run, recipe: Recipe, name: str, text: str) -> None:
    (run.folder / name).write_text(text)
    with pytest.raises(ArtefactError, match=rf"{name}: damaged, not a JSON object; restore it, or start again with"):
        evaluate_run(run.folder, recipe, report=quiet) if name == "run.json" else train_run(
            recipe, run.folder, resume=True, report=quiet
        )


def test_a_record_without_hashes_is_damaged(run: Run, recipe: Recipe) -> None:
    (run.folder / "run.json").write_text('{"name": "tiny"}')
    with pytest.raises(ArtefactError, match=r"run.json: damaged, without hashes"):
        evaluate_run(run.folder, recipe, report=quiet)


@pytest.mark.parametrize(
    "name", ["encoder.safetensors", "best.safetensors", "optimizer.pt", "progress.json", "rng_state.pth"]
)
def test_a_damaged_checkpoint_is_left_out_for_the_one_before(
    run: Run, recipe: Recipe, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = checkpoints(checkpoint_folder(run.folder))[-1]
    assert newest.name == "checkpoint-4"
    (newest / name).write_bytes((newest / name).read_bytes()[:20])
    record = read_json(run.folder / "run.json")
    record.pop("content_hash")
    (run.folder / "run.json").write_text(json.dumps(record))
    again = train_run(change(recipe, evaluation={"seed": 9}), run.folder, resume=True, report=quiet)
    assert f"{newest} is damaged and left out" in caplog.text
    assert again.prefix.card.content_hash == run.prefix.card.content_hash


@pytest.mark.parametrize(
    "name", ["encoder.safetensors", "best.safetensors", "trainer_state.json", "progress.json", "rng_state.pth"]
)
def test_a_checkpoint_with_one_byte_changed_is_left_out_too(
    run: Run, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = checkpoints(checkpoint_folder(run.folder))[-1]
    content = (newest / name).read_bytes()
    place = len(content) // 2
    (newest / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    found = newest_readable(checkpoint_folder(run.folder))
    assert found is not None
    assert found != newest
    assert f"{newest} is damaged and left out: {name} is not what was written" in caplog.text
    (newest / name).unlink()
    assert newest_readable(checkpoint_folder(run.folder)) == found
    assert f"{newest} is damaged and left out: {name} is missing" in caplog.text


def test_a_run_that_learned_nothing_says_so(
    run: Run, recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "nothing was learned" not in caplog.text
    still = train_run(change(recipe, train={"learning_rate": 1e-30}), tmp_path / "still", report=quiet)
    assert read_json(still.folder / "run.json")["best_step"] == 0
    assert "what is kept is the start, nothing was learned; lower the learning rate, or train for more" in caplog.text


def test_with_every_checkpoint_damaged_the_run_says_so(run: Run, recipe: Recipe) -> None:
    for checkpoint in checkpoints(checkpoint_folder(run.folder)):
        (checkpoint / "progress.json").write_text("{")
    (run.folder / "scores.json").unlink()
    record = read_json(run.folder / "run.json")
    record.pop("content_hash")
    (run.folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(TrainingError, match="every checkpoint is damaged; start again with --overwrite"):
        train_run(recipe, run.folder, resume=True, report=quiet)


def test_a_deployed_artefact_alone_can_be_generated_with(run: Run, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "deployed").mkdir()
    for name in ("prefix.json", "prefix.safetensors"):
        shutil.copy(run.folder / name, tmp_path / "deployed" / name)
    _, prefix, found = load_run(tmp_path / "deployed")
    assert prefix.card.content_hash == run.prefix.card.content_hash
    assert found == recipe


def test_two_processes_do_not_train_in_one_folder(recipe: Recipe, tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run"),
        pytest.raises(TrainingError, match="run: another process is working in it; wait for"),
    ):
        train_run(recipe, tmp_path / "run", report=quiet)
    assert not (tmp_path / "run").exists()
    assert train_run(recipe, tmp_path / "run", report=quiet).report.is_file()


def test_a_run_that_another_process_works_on_is_not_measured(run: Run, recipe: Recipe) -> None:
    with locked(run.folder), pytest.raises(TrainingError, match="another process is working in it; wait for it, or"):
        evaluate_run(run.folder, recipe, report=quiet)


def test_an_artefact_of_another_run_is_not_measured(run: Run, recipe: Recipe, tmp_path: Path) -> None:
    other = train_run(change(recipe, train={"seed": 5}), tmp_path / "other", report=quiet)
    for name in ("prefix.json", "prefix.safetensors"):
        shutil.copy(other.folder / name, run.folder / name)
    with pytest.raises(ArtefactError, match=r": its prefix is not the one that run.json tells of; start again with"):
        evaluate_run(run.folder, recipe, report=quiet)


def test_an_artefact_without_its_record_is_not_measured(run: Run, recipe: Recipe) -> None:
    shutil.rmtree(run.folder / "training")
    (run.folder / "run.json").unlink()
    with pytest.raises(ArtefactError, match=r": holds no run.json, so that it is not known what the run learned; rest"):
        evaluate_run(run.folder, recipe, report=quiet)


def test_a_measuring_that_was_killed_is_done_again(run: Run, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (run.folder / "scores.json").read_text()

    def killed(path: Path, values: object) -> None:
        raise Killed

    monkeypatch.setattr("prefixkit.lab.run.run.write_json", killed)
    with pytest.raises(Killed):
        evaluate_run(run.folder, change(recipe, evaluation={"heldout_rows": 3}), report=quiet)
    monkeypatch.undo()
    assert not is_measured(run.folder, recipe)
    train_run(recipe, run.folder, resume=True, report=quiet)
    assert (run.folder / "scores.json").read_text() == whole


@pytest.mark.parametrize("kept", [1, 2, 3, 6])
def test_a_folder_that_was_half_emptied_never_goes_on_as_a_run_on_other_data(
    run: Run, recipe: Recipe, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while --overwrite empties it, then resumed: the old run, or a new one from its beginning."""
    gone: list[Path] = []

    def stopping(path: Path) -> None:
        if len(gone) == kept:
            raise Killed
        gone.append(path)
        shutil.move(path, path.parent.parent / f"gone {path.name}")

    monkeypatch.setattr("prefixkit.lab.run.folder.shutil.rmtree", stopping)
    monkeypatch.setattr(
        Path, "unlink", lambda path, missing_ok=False: stopping(path) if path.parent == run.folder else None
    )
    with pytest.raises(Killed):
        open_run(run.folder, recipe, overwrite=True)
    monkeypatch.undo()
    assert (run.folder / "recipe.yaml").is_file()
    assert not is_measured(run.folder, recipe)
    assert (run.folder / "run.json").exists() or not (run.folder / "training").exists()
    check_run(run.folder, recipe, resume=False, overwrite=True)


def test_checkpoints_that_nothing_is_known_of_are_refused(run: Run, recipe: Recipe) -> None:
    for name in ("run.json", "scores.json"):
        (run.folder / name).unlink()
    with pytest.raises(ArtefactError, match=r": no run.json says what its checkpoints learned from; start again with"):
        train_run(recipe, run.folder, resume=True, report=quiet)


def test_the_present_folder_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with locked(Path()), pytest.raises(TrainingError, match="here: another process is working in it"), locked(Path()):
        pass
