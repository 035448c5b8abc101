"""Labels to learn: the number of a class where the head looks, -100 elsewhere, and nothing of it in other formats."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Regex, normalizers, processors
from transformers import PreTrainedTokenizerFast

from prefixkit.config import DataConfig, SplitConfig
from prefixkit.data import NO_LOSS, Example, PreparedData, Row, ask, heldout_texts, prepare
from prefixkit.data.labelled import build_labelled, class_names
from prefixkit.errors import DataError

EVEN = SplitConfig(train=0.4, validation=0.2, test=0.2, judge=0.2)
WORDS = "good film bad movie plot fun story end actor scene".split()
BOS, EOS = 1, 2


@pytest.fixture
def closed_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Puts a token before a text and one behind it, as an encoder's does."""
    closed = copy.deepcopy(tiny_tokenizer)
    closed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return closed


def config(kind: str, **settings: Any) -> DataConfig:
    return DataConfig(**({"format": kind, "label_column": "label", "source": "x.jsonl"} | settings))


def numbers(example: Example) -> list[int]:
    assert len(example.labels) == len(example.input_ids)
    return [label for label in example.labels if label != NO_LOSS]


def test_classes_are_the_labels_that_occur_in_the_order_of_their_names() -> None:
    assert class_names([Row(1, text="a", label="good"), Row(2, text="b", label="bad")]) == ("bad", "good")
    tagged = [Row(1, words=("a", "b"), tags=("O", "PER")), Row(2, words=("c",), tags=("LOC",))]
    assert class_names(tagged) == ("LOC", "O", "PER")
    with pytest.raises(DataError) as caught:
        class_names([Row(1, text="a", label="good"), Row(2, text="b", label="good")])
    assert str(caught.value) == ("data.label_column: every row says 'good'; there must be two labels to tell apart")


def test_an_encoder_labels_a_text_at_its_first_token(closed_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [Row(1, text="good film", label="b"), Row(2, text="bad", label="a")]
    built = build_labelled(rows, config("classes"), closed_tokenizer, ("a", "b", "c"), reads_both_ways=True)
    good, film, bad = closed_tokenizer.convert_tokens_to_ids(["good", "film", "bad"])
    assert built.examples == (
        Example("", "good film", (BOS, good, film, EOS), (1, NO_LOSS, NO_LOSS, NO_LOSS)),
        Example("", "bad", (BOS, bad, EOS), (0, NO_LOSS, NO_LOSS)),
    )
    assert (built.truncated, built.without_loss) == (0, 0)


def test_a_decoder_labels_a_text_at_the_end_of_text_behind_it(any_tokenizer: PreTrainedTokenizerFast) -> None:
    row = Row(1, text="good film, wonderful acting", label="b")
    for most in (96, 3):
        built = build_labelled(
            [row], config("classes", max_tokens=most), any_tokenizer, ("a", "b"), reads_both_ways=False
        )
        (example,) = built.examples
        assert example.input_ids[-1] == any_tokenizer.eos_token_id
        assert example.labels == (NO_LOSS,) * (len(example.labels) - 1) + (1,)
        assert built.truncated == (most == 3)


@pytest.mark.parametrize("reads_both_ways", [True, False])
def test_each_word_is_labelled_at_its_first_token(
    bos_tokenizer: PreTrainedTokenizerFast, reads_both_ways: bool
) -> None:
    row = Row(1, words=("Ada", "loved", "Zürich"), tags=("PER", "O", "LOC"))
    names = ("LOC", "O", "PER")
    built = build_labelled([row], config("tags"), bos_tokenizer, names, reads_both_ways=reads_both_ways)
    (example,) = built.examples
    assert (example.prompt, example.text) == ("", "Ada loved Zürich")
    assert len(example.input_ids) > 5, "some word must have several tokens"
    assert example.labels[0] == NO_LOSS, "that of BOS"
    assert numbers(example) == [2, 1, 0]
    first = {names[label]: token for label, token in zip(example.labels, example.input_ids, strict=True) if label >= 0}
    letters = {tag: bos_tokenizer.decode([token]).strip() for tag, token in first.items()}
    assert all(word.startswith(letters[tag]) for word, tag in zip(row.words, row.tags, strict=True))


def test_words_that_are_cut_off_are_not_learned(closed_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [Row(1, words=("good", "film", "plot"), tags=("a", "b", "c")), Row(2, words=("bad",), tags=("c",))]
    names = ("a", "b", "c")
    for most, learned, cut, empty in ((5, [[0, 1, 2], [2]], 0, 0), (4, [[0, 1], [2]], 1, 0), (3, [[0], [2]], 1, 0)):
        built = build_labelled(rows, config("tags", max_tokens=most), closed_tokenizer, names, reads_both_ways=True)
        assert [numbers(example) for example in built.examples] == learned
        assert [len(example.words) for example in built.examples] == [len(each) for each in learned]
        assert (built.truncated, built.without_loss) == (cut, empty)


@pytest.mark.parametrize("kind", ["classes", "tags"])
def test_a_longer_row_is_an_error_where_nothing_may_be_cut(kind: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = {"text": "good film plot", "label": "a"} if kind == "classes" else {
        "words": ("good", "film", "plot"), "tags": ("a", "a", "b")}  # fmt: skip
    settings = config(kind, max_tokens=2, truncate=False)
    with pytest.raises(DataError) as caught:
        build_labelled([Row(7, **text)], settings, tiny_tokenizer, ("a", "b"), reads_both_ways=True)
    assert str(caught.value) == (
        "row 7: more tokens than data.max_tokens (2); raise it, or set data.truncate to true to cut longer rows"
    )


def three(i: int) -> list[str]:
    """Three words that no other number below 300 has."""
    return [WORDS[i % 10], WORDS[i // 10 % 10], WORDS[i // 100]]


CLASSES = [{"text": " ".join(three(i)), "label": ("no", "yes")[i % 2]} for i in range(300)]
TAGS = [{"text": three(i), "label": ["O", "AB"[i % 2], "O"]} for i in range(300)]


@pytest.fixture
def run(
    write_jsonl: Callable[..., str], closed_tokenizer: PreTrainedTokenizerFast, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., PreparedData]:
    """Prepare records for an encoder, or for a decoder; keywords change the settings."""

    def prepared(kind: str, rows: list[Any], *, reads_both_ways: bool = True, **settings: Any) -> PreparedData:
        chosen = config(kind, **({"source": write_jsonl(rows), "split": EVEN} | settings))
        return prepare(
            chosen,
            closed_tokenizer if reads_both_ways else tiny_tokenizer,
            prefix_tokens=4,
            context_tokens=None,
            reads_both_ways=reads_both_ways,
        )

    return prepared


@pytest.mark.parametrize("reads_both_ways", [True, False])
def test_every_example_has_the_labels_of_its_row(run: Callable[..., PreparedData], reads_both_ways: bool) -> None:
    data = run("classes", CLASSES, reads_both_ways=reads_both_ways)
    assert data.classes == ("no", "yes")
    truth = {row["text"]: [row["label"]] for row in CLASSES}
    tagged = run("tags", TAGS, reads_both_ways=reads_both_ways)
    assert tagged.classes == ("A", "B", "O")
    tags = {" ".join(row["text"]): row["label"] for row in TAGS}
    for found, expected in ((data, truth), (tagged, tags)):
        assert min(map(len, (found.train, found.validation, found.test))) > 20
        for example in (*found.train, *found.validation, *found.test):
            assert [found.classes[number] for number in numbers(example)] == expected[example.text]
        assert (found.contrast, found.kept_label) == ((), None)


@pytest.mark.parametrize(
    ("kind", "rows", "twin", "opposite"),
    [
        ("classes", CLASSES, {"text": CLASSES[0]["text"].upper(), "label": "no"},
         {"text": CLASSES[1]["text"], "label": "no"}),
        ("tags", TAGS, {"text": [word.upper() for word in TAGS[0]["text"]], "label": ["O", "A", "O"]},
         {"text": TAGS[1]["text"], "label": ["O", "O", "B"]}),
    ],
)  # fmt: skip
def test_contradictory_rows_are_left_out_with_all_their_copies(
    run: Callable[..., PreparedData], kind: str, rows: list[Any], twin: Any, opposite: Any
) -> None:
    counts = run(kind, [*rows, twin, opposite]).counts
    assert (counts.read, counts.duplicates, counts.contradictory) == (302, 1, 2)


def test_words_that_have_a_tag_are_not_cleaned(run: Callable[..., PreparedData]) -> None:
    rows = [{"text": ["&amp;", "<br", "/>", str(i)], "label": ["A", "O", "O", "B"]} for i in range(100)]
    data = run("tags", rows)
    assert {example.text.rsplit(" ", 1)[0] for example in data.train} == {"&amp; <br />"}
    assert all(len(numbers(example)) == 4 for example in data.train)


@pytest.mark.parametrize(("kind", "rows"), [("classes", CLASSES), ("tags", TAGS)])
def test_rows_of_a_judge_that_nobody_needs_are_learned_from(
    run: Callable[..., PreparedData], kind: str, rows: list[Any]
) -> None:
    data = run(kind, rows)
    assert data.counts.train + data.counts.validation + data.counts.test == 300
    assert data.counts.judge == 0
    without = EVEN.model_copy(update={"train": EVEN.train + EVEN.judge, "judge": 0.0})
    assert data.train == run(kind, rows, split=without).train


@pytest.mark.parametrize(("kind", "rows"), [("classes", CLASSES), ("tags", TAGS)])
def test_a_length_that_leaves_no_room_for_text_is_an_error(
    run: Callable[..., PreparedData], kind: str, rows: list[Any]
) -> None:
    with pytest.raises(DataError) as caught:
        run(kind, rows, max_tokens=2)
    assert str(caught.value) == "data.max_tokens: 2 leaves no room for text beside 2 special tokens; raise it"


def test_a_tokenizer_that_reads_none_of_the_words_is_an_error(
    closed_tokenizer: PreTrainedTokenizerFast, run: Callable[..., PreparedData]
) -> None:
    closed_tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("."), "")
    with pytest.raises(DataError) as caught:
        run("tags", TAGS)
    assert str(caught.value) == (
        "data.text_column: the tokenizer of this base model reads no word of the train split; choose another base model"
    )


def test_the_hash_follows_the_names_of_the_classes(run: Callable[..., PreparedData]) -> None:
    renamed = [{"text": row["text"], "label": {"no": "bad", "yes": "good"}[row["label"]]} for row in CLASSES]
    first, other = run("classes", CLASSES), run("classes", renamed)
    assert (first.train, first.validation) == (other.train, other.validation)
    assert first.hash != other.hash
    assert run("classes", CLASSES).hash == first.hash


#: Of the commit in which rows of a judge nobody needs came to be learned from; runs started then must still be resumed.
BEFORE = {
    "text": "b06cabe07a5223fbc2bc092fba6005ea70175047f58ba1eaf31523c34d9cb6b3",
    "input_target": "48e159d8590fcd2846086ab4fdc6243657bba703b4ec3cf2e9242d65e9e2c799",
    "messages": "e46a338e47b6eb0b6a6b45897925d94a77e8755034530c91b89f6807d7182806",
}


@pytest.mark.parametrize("kind", BEFORE)
def test_the_hash_of_texts_is_what_it_was(
    write_jsonl: Callable[..., str], tiny_tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    rows = []
    for i in range(40):
        text = f"{WORDS[i % 10]} {WORDS[i // 10]} was {WORDS[i * 7 % 10]}"
        talk = [{"role": "user", "content": text}, {"role": "assistant", "content": WORDS[i % 3]}]
        rows.append({"text": text, "input": text, "target": WORDS[i % 3], "messages": talk})
    data = DataConfig(source=write_jsonl(rows), format=kind, split=EVEN)  # type: ignore[arg-type]
    assert prepare(data, tiny_tokenizer, prefix_tokens=2, context_tokens=None).hash == BEFORE[kind]


@pytest.mark.parametrize("kind", ["classes", "tags"])
def test_where_labels_are_learned_there_is_no_text_to_ask_for(
    kind: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError) as caught:
        ask("good film", config(kind), tiny_tokenizer)
    assert str(caught.value) == "this artefact learned labels, and writes no text; see `prefixkit classify`"


@pytest.mark.parametrize("kind", ["classes", "tags"])
def test_held_out_texts_are_test_rows_of_all_labels_without_loss(
    write_jsonl: Callable[..., str], closed_tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    rows = []
    for i in range(100):
        words = [WORDS[(i * 7 + k) % 10] for k in range(1 + i % 9)] + [WORDS[i // 10], WORDS[i % 10]]
        row = {"text": words, "label": ["AB"[i % 2]] + ["O"] * (len(words) - 1)}
        rows.append(row if kind == "tags" else {"text": " ".join(words), "label": "ab"[i % 2]})
    data = config(kind, source=write_jsonl(rows), split=EVEN, max_tokens=5)
    options: dict[str, Any] = {"reads_both_ways": True}
    found = heldout_texts(data, closed_tokenizer, max_tokens=8, count=1000, **options)
    prepared = prepare(data, closed_tokenizer, prefix_tokens=0, context_tokens=None, **options)
    assert {example.text for example in found} == {example.text for example in prepared.test}
    assert {label for example in prepared.test for label in numbers(example)} >= {0, 1}
    lengths = [len(example.input_ids) for example in found]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) == 8 > min(lengths)
    for example in found:
        whole = tuple(closed_tokenizer(example.text)["input_ids"])
        assert example.input_ids == (whole if len(whole) <= 8 else (*whole[:7], EOS))
        assert not example.loss_tokens
    assert heldout_texts(data, closed_tokenizer, max_tokens=8, count=3, **options) == found[:3]
