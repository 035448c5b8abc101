"""Streams: every row once a lap, in an order that follows from the batch's number, without holding the source."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from prefixkit import processes
from prefixkit.config import DataConfig, TrainConfig
from prefixkit.data import Example, PreparedData, prepare, sources
from prefixkit.data.stream import Place, Position, StreamedExamples, StreamSampler, TrainingStream
from prefixkit.errors import ConfigError, DataError

TRAIN = TrainConfig(steps=20, batch_size=4, seed=3)
SPLIT = {"train": 0.7, "validation": 0.1, "test": 0.2, "judge": 0.0}


def rows(count: int) -> list[dict[str, Any]]:
    """Texts of differing length, some of them twice, some of another label."""
    return [
        {"text": f"{'the film was good ' * (1 + i % 5)}{i - (i % 7 == 0)}", "label": "pos" if i % 4 else "neg"}
        for i in range(count)
    ]


def prepared(config: DataConfig, tokenizer: Any) -> PreparedData:
    return prepare(config, tokenizer, prefix_tokens=2, context_tokens=64)


@pytest.fixture
def make(write_jsonl: Callable[..., str], tiny_tokenizer: Any) -> Callable[..., tuple[DataConfig, TrainingStream]]:
    def make(count: int = 300, **settings: Any) -> tuple[DataConfig, TrainingStream]:
        values = {"source": write_jsonl(rows(count)), "label_column": "label", "keep_label": "pos", "stream": True,
                  "stream_head": 150, "stream_window": 40, "split": SPLIT, "max_tokens": 32}  # fmt: skip
        config = DataConfig(**values | settings)
        data = prepared(config, tiny_tokenizer)
        assert data.stream is not None
        return config, data.stream

    return make


def ids(examples: Any) -> list[tuple[int, ...]]:
    return [example.input_ids for example in examples]


def test_a_lap_of_the_stream_is_the_training_split(
    make: Callable[..., tuple[DataConfig, TrainingStream]], tiny_tokenizer: Any
) -> None:
    config, stream = make()
    whole = prepared(config.model_copy(update={"stream": False}), tiny_tokenizer)
    count = len(whole.train)
    read = [example for window in itertools.islice(stream.windows(count), 2) for example in window.examples]
    assert tuple(read) == whole.train * 2  # and again from the start


def test_held_out_rows_are_those_of_the_head_and_no_training_row_is_one(
    make: Callable[..., tuple[DataConfig, TrainingStream]], tiny_tokenizer: Any
) -> None:
    config, stream = make()
    data = prepared(config, tiny_tokenizer)
    head = prepared(config.model_copy(update={"stream": False, "source": _head(config)}), tiny_tokenizer)
    assert (data.validation, data.test, data.contrast) == (head.validation, head.test, head.contrast)
    held_out = {example.text for example in (*data.validation, *data.test)}
    assert held_out
    assert not held_out & {example.text for example in next(stream.windows(200)).examples}


def _head(config: DataConfig) -> str:
    path = Path(config.source).with_name("head.jsonl")
    path.write_text("\n".join(Path(config.source).read_text().splitlines()[:150]), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("at", [0, 1, 2, 5, 11])
def test_a_window_is_the_same_wherever_reading_began(
    at: int, make: Callable[..., tuple[DataConfig, TrainingStream]]
) -> None:
    _, stream = make(120)  # 11 windows are several laps
    windows = list(itertools.islice(stream.windows(16), 13))
    assert windows[11].start.lap > 1
    again = next(stream.windows(16, windows[at].start))
    assert again == windows[at]
    assert again.hash == windows[at].hash != windows[at + 1].hash


def test_a_record_of_several_targets_may_lie_in_two_windows(
    write_jsonl: Callable[..., str], tiny_tokenizer: Any
) -> None:
    pairs = [{"input": f"story {i}", "target": [f"good {i}", f"great {i}", f"fine {i}"]} for i in range(60)]
    config = DataConfig(source=write_jsonl(pairs), format="input_target", stream=True, split=SPLIT, max_tokens=32)
    stream = prepared(config, tiny_tokenizer).stream
    assert stream is not None
    windows = list(itertools.islice(stream.windows(4), 6))
    assert {window.start.rows for window in windows} == {0, 1, 2}
    assert [next(stream.windows(4, window.start)) for window in windows] == windows


def test_batches_follow_from_their_number_alone(
    make: Callable[..., tuple[DataConfig, TrainingStream]], tmp_path: Path
) -> None:
    _, stream = make()
    record = tmp_path / "stream.json"
    places = list(StreamSampler(20, 4))
    one = StreamedExamples(stream, TRAIN, record)
    assert len(one) == 80
    read = [[one[place] for place in batch] for batch in places]
    assert (
        read
        == [[StreamedExamples(stream, TRAIN, tmp_path / "none")[place] for place in batch] for batch in places[:1]]
        + read[1:]
    )
    later = StreamedExamples(stream, TRAIN, record)
    assert [later[place] for place in places[13]] == read[13]  # window 1, from its record
    assert [later[place] for place in places[2]] == read[2]  # back, as after a rollback
    fresh = StreamedExamples(stream, TRAIN, tmp_path / "lost.json")
    assert [fresh[place] for place in places[13]] == read[13]  # without the record: from the beginning
    windows = [example for window in itertools.islice(stream.windows(40), 2) for example in window.examples]
    assert Counter(example for batch in read for example in batch) == Counter(windows)
    assert read[0] != windows[:4]  # shuffled
    widths = [max(map(len, ids(batch))) - min(map(len, ids(batch))) for batch in read]
    assert sum(width == 0 for width in widths) > 10  # grouped by length
    other = StreamedExamples(stream, TRAIN.model_copy(update={"seed": 4}), tmp_path / "other.json")
    assert [other[place] for place in places[0]] != read[0]


def test_processes_share_the_batches_of_one(
    make: Callable[..., tuple[DataConfig, TrainingStream]], tmp_path: Path
) -> None:
    shares = [list(StreamSampler(5, 4, rank=rank, num_replicas=3)) for rank in range(3)]
    assert [len(batch) for share in shares for batch in share[:1]] == [2, 1, 1]
    whole = [sorted(place for share in shares for place in share[batch]) for batch in range(5)]
    assert whole == [[Place(batch, row) for row in range(4)] for batch in range(5)]
    with pytest.raises(ConfigError, match="5 processes cannot share batches of 4"):
        StreamSampler(5, 4, num_replicas=5)
    _, stream = make()
    StreamedExamples(stream, TRAIN, tmp_path / "stream.json", writes=False)[Place(0, 0)]
    assert not (tmp_path / "stream.json").exists()


def test_a_source_that_changed_meanwhile_is_refused(
    make: Callable[..., tuple[DataConfig, TrainingStream]], tmp_path: Path
) -> None:
    config, stream = make()
    record = tmp_path / "stream.json"
    StreamedExamples(stream, TRAIN, record)[Place(13, 0)]
    assert len(json.loads(record.read_text())) == 2
    path = Path(config.source)
    path.write_text(path.read_text().replace("good 99", "bad 99"), encoding="utf-8")
    with pytest.raises(DataError, match=r"its rows from \d+ on are other ones than when this run read them; start"):
        StreamedExamples(stream, TRAIN, record)[Place(13, 0)]


def test_a_source_without_end_is_read_no_further_than_needed(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    taken = []

    def endless(config: DataConfig, skipped: int = 0) -> Iterator[dict[str, Any]]:
        for number in itertools.count(skipped):
            taken.append(number)
            yield {"text": f"the film was good {number}"}

    monkeypatch.setattr(sources, "_records", endless)
    config = DataConfig(source="endless", stream=True, stream_head=100, stream_window=40, split=SPLIT)
    data = prepared(config, tiny_tokenizer)
    assert len(taken) == data.counts.read == 100
    assert data.stream is not None
    StreamedExamples(data.stream, TRAIN, tmp_path / "stream.json")[Place(9, 3)]
    assert len(taken) < 100 + 40 / 0.7 + 2 * 1024  # a window, and what is encoded at a time
    assert len(data.stream.texts(40, 80)) == 80
    assert len(data.stream.texts(40, 41)) == 80  # the second window was read


def test_a_hub_data_set_is_streamed_from_where_it_is_read(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    asked = []
    skipped = []
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    values = {"text": [row["text"] for row in rows(300)], "label": [int(row["label"] == "pos") for row in rows(300)]}
    whole = datasets.Dataset.from_dict(values, features=features).to_iterable_dataset()
    skip = datasets.IterableDataset.skip

    def load(*args: Any, **options: Any) -> datasets.IterableDataset:
        asked.append(options)
        return whole

    def note(self: datasets.IterableDataset, n: int) -> datasets.IterableDataset:
        skipped.append(n)
        return skip(self, n)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.IterableDataset, "skip", note)
    config = DataConfig(source="some/set", label_column="label", keep_label="pos", stream=True, stream_head=150,
                        stream_window=40, split=SPLIT, max_tokens=32)  # fmt: skip
    stream = prepared(config, tiny_tokenizer).stream
    assert stream is not None
    record = tmp_path / "stream.json"
    first = StreamedExamples(stream, TRAIN, record)[Place(13, 0)]
    assert all(options == {"split": "train", "streaming": True} for options in asked)
    assert not skipped
    assert StreamedExamples(stream, TRAIN, record)[Place(13, 0)] == first
    assert skipped == [json.loads(record.read_text())[1][0][1]] != [0]


def test_what_was_learned_is_told_once(make: Callable[..., tuple[DataConfig, TrainingStream]]) -> None:
    _, stream = make(60)
    lap = list(itertools.islice(stream.windows(8), 3))
    assert stream.texts(8, 20) == list(dict.fromkeys(e.text for window in lap for e in window.examples))
    every = stream.texts(8, 10_000)  # many laps
    assert len(every) == len(set(every)) == len(stream.texts(8, 100_000))


def test_processes_that_read_other_rows_are_refused(
    make: Callable[..., tuple[DataConfig, TrainingStream]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stream = make()
    monkeypatch.setattr(processes, "from_first", lambda value: (value[0], "another hash"))
    with pytest.raises(DataError, match="the processes of this run read different rows; give all the same source"):
        StreamedExamples(stream, TRAIN, tmp_path / "stream.json")[Place(0, 0)]


def test_the_hash_says_how_a_source_is_streamed(
    make: Callable[..., tuple[DataConfig, TrainingStream]], tiny_tokenizer: Any
) -> None:
    config, _ = make()
    changes: list[dict[str, Any]] = [{}, {"stream": False}, {"stream_window": 20}, {"stream_head": 140}]
    hashes = [prepared(config.model_copy(update=change), tiny_tokenizer).hash for change in changes]
    assert len(set(hashes)) == 4
    plain = config.model_copy(update={"stream": False})
    assert (
        prepared(plain, tiny_tokenizer).hash
        == prepared(plain.model_copy(update={"stream_window": 3}), tiny_tokenizer).hash
    )


def test_a_label_that_the_head_lacks_is_not_said_to_be_missing(
    write_jsonl: Callable[..., str], tiny_tokenizer: Any
) -> None:
    values = [{"text": f"film {i}", "label": "neg" if i < 200 else "pos"} for i in range(400)]
    config = DataConfig(
        source=write_jsonl(values), label_column="label", keep_label="pos", stream=True, stream_head=100
    )
    with pytest.raises(
        DataError, match=r'no row of its first 100 \(data.stream_head\) of .* has "pos" in column "label"'
    ):
        prepared(config, tiny_tokenizer)


def test_a_head_too_short_for_every_split_is_told_to_be_longer(
    make: Callable[..., tuple[DataConfig, TrainingStream]], tiny_tokenizer: Any
) -> None:
    config, _ = make()
    with pytest.raises(DataError, match=r"data.split.\w+: none of the \d rows left .*; raise data.stream_head"):
        prepared(config.model_copy(update={"stream_head": 3}), tiny_tokenizer)


def test_nothing_to_learn_from_is_an_error_and_no_endless_loop(
    make: Callable[..., tuple[DataConfig, TrainingStream]],
) -> None:
    config, stream = make()
    Path(config.source).write_text('{"text": "the film", "label": "neg"}', encoding="utf-8")
    with pytest.raises(DataError, match="has no row to learn from; widen the filters"):
        next(stream.windows(4))
    with pytest.raises(DataError, match="has no row to learn from"):
        next(stream.windows(4, Position(1, 5)))


def test_a_long_text_further_down_is_refused_when_it_is_read(
    make: Callable[..., tuple[DataConfig, TrainingStream]], tiny_tokenizer: Any
) -> None:
    config, _ = make()
    with open(config.source, "a", encoding="utf-8") as file:
        file.writelines(f'\n{{"text": "{"film " * 90}{i}", "label": "pos"}}' for i in range(9))
    data = prepared(config.model_copy(update={"max_tokens": 96}), tiny_tokenizer)
    assert data.stream is not None
    with pytest.raises(DataError, match=r"prefix 2 \+ text \d+ tokens exceed the model's context of 64"):
        list(itertools.islice(data.stream.windows(40), 10))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"format": "classes", "label_column": "label"}, "format classes"),
        ({"label_column": "label", "keep_label": "pos", "clearest": 0.5}, "clearest"),
        ({"max_rows": 10}, "max_rows"),
        ({"format": "input_target", "label_column": "label"}, "data.split.judge with format input_target"),
    ],
)
def test_what_needs_all_rows_is_refused(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=f"stream reads rows as they come, {what} needs all of them; leave one of"):
        DataConfig(source="x.jsonl", stream=True, **settings)


def test_a_stream_without_labels_has_no_judge_to_keep_rows_for() -> None:
    assert DataConfig(source="x.jsonl", stream=True, format="input_target").shares.judge == 0  # type: ignore[arg-type]


def test_rows_of_which_nothing_is_learned_are_passed_over(write_jsonl: Callable[..., str], tiny_tokenizer: Any) -> None:
    pairs = [{"input": "the film " * (20 if i % 3 == 0 else 1) + str(i), "target": f"good {i}"} for i in range(90)]
    config = DataConfig(source=write_jsonl(pairs), format="input_target", stream=True, split=SPLIT, max_tokens=16)
    data = prepared(config, tiny_tokenizer)
    assert data.stream is not None
    read = next(data.stream.windows(len(data.train))).examples
    assert read == data.train
    assert all(isinstance(example, Example) and example.loss_tokens for example in read)
