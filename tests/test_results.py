"""Numbers people read are those of the committed result files."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

from prefixkit.files import read_json

ROOT = Path(__file__).parents[1]


def load_publish(name="publish"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_says_what_the_result_files_say():
    publish = load_publish()
    folder = publish.RESULTS / "positive-reviews"
    run, scores = read_json(folder / publish.RUN), read_json(folder / publish.SCORES)
    block = publish.readme_block(run, scores, read_json(publish.QUALITY))
    assert block in (ROOT / "README.md").read_text(encoding="utf-8")


def test_published_runs_and_benchmarks_trained_the_shipped_recipe():
    """A result of another recipe than the one that ships would answer for something nobody can run."""
    from prefixkit.config import load_recipe, validate_recipe

    publish = load_publish()
    shipped = load_recipe("positive-reviews")
    run, quality = read_json(publish.RESULTS / "positive-reviews" / publish.RUN), read_json(publish.QUALITY)
    # Settings that came later are not in the files: their defaults leave everything as it was.
    assert validate_recipe(run["recipe"]) == shipped
    assert validate_recipe(quality["recipe"]) == shipped


def test_the_page_on_diagnosing_says_what_the_published_diagnosis_says():
    publish = load_publish("publish_diagnosis")
    folder = publish.RESULTS / "positive-reviews"
    found = publish.read_diagnosis(folder / publish.DIAGNOSIS)
    page = publish.PAGE.read_text(encoding="utf-8")
    assert publish.findings_block(found) in page
    assert found.prefix_hash == read_json(folder / "run.json")["content_hash"]
    for name in publish.PICTURES:
        assert f"results/positive-reviews/{name}" in page
        picture = (folder / name).read_text(encoding="utf-8")
        assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in picture


def test_the_page_on_classification_says_what_the_published_run_says():
    from prefixkit.config import load_recipe, validate_recipe

    publish = load_publish("publish_labels")
    run, scores, predictions = publish.read_published("review-sentiment")
    assert publish.results_block(run, scores, predictions) in publish.PAGE.read_text(encoding="utf-8")
    assert validate_recipe(run["recipe"]) == load_recipe("review-sentiment")
    assert all(not line["text"] for line in predictions)


def test_the_page_on_performance_says_what_the_result_says():
    publish = load_publish("publish_speed")
    page = publish.PAGE.read_text(encoding="utf-8")
    assert page == publish.render(read_json(publish.RESULT), read_json(publish.RESIDENT))
    assert "results/speed.svg" in page
    assert ElementTree.fromstring(publish.FIGURE.read_text(encoding="utf-8")).tag == "{http://www.w3.org/2000/svg}svg"
