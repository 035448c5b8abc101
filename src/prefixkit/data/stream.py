"""Training rows read as they are needed: data larger than memory, in an order that a resumed run repeats.

The rows of the training split, in the order of the source and from its beginning again when it ends, are cut into
windows. A window is read, encoded, shuffled and grouped by length as a whole data set is, and forgotten when the next
one begins. Which rows make a batch follows from its number alone, so that resuming is exact; where in the source each
window began is written down, so that it is quick as well.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset, Sampler

from prefixkit import processes
from prefixkit.config import DataConfig, TrainConfig
from prefixkit.data.batches import LengthGroupedSampler, check_batch_size
from prefixkit.data.clean import clean_row
from prefixkit.data.examples import BuiltExamples, Example
from prefixkit.data.filters import filter_rows
from prefixkit.data.rows import Row
from prefixkit.data.sources import kept_label, rows_behind
from prefixkit.data.splits import Split, content_hash, split_of
from prefixkit.errors import DataError
from prefixkit.files import read_json, write_json

#: Rows encoded at a time.
_AT_ONCE = 1024


class Position(NamedTuple):
    """A place in the source, which is read round and round.

    Attributes:
        lap: how often the source has ended before.
        records: of the source, before this place in this lap.
        rows: of the next record, before this place; a record with several targets is several rows.
    """

    lap: int = 0
    records: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Window:
    """Consecutive rows of the training split.

    Attributes:
        examples: in the order of the source.
        start: the place of the first.
    """

    examples: tuple[Example, ...]
    start: Position

    @property
    def hash(self) -> str:
        """SHA-256 of what is read and learned."""
        digest = sha256()
        for example in self.examples:
            digest.update(repr((example.source_ids, example.input_ids, example.labels)).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class TrainingStream:
    """The training rows of a source that is not held.

    Attributes:
        config: the recipe's data section.
        encode: turns rows into examples.
        check: raises if one of them does not fit the model.
    """

    config: DataConfig
    encode: Callable[[Sequence[Row]], BuiltExamples]
    check: Callable[[Sequence[Example]], None]

    def windows(self, size: int, start: Position | None = None) -> Generator[Window]:
        """Yield windows of so many examples, without end. Rows of a window that say the same in one lap become one.

        Args:
            size: examples of a window.
            start: where to begin; left out, at the beginning of the source.

        Raises:
            DataError: the source cannot be read, a row does not fit the model, or there is none to learn from.
        """
        found: dict[tuple[int, bytes], tuple[Position, Example]] = {}
        for at, row, example in self._examples(start or Position()):
            found.setdefault((at.lap, content_hash(row.content)), (at, example))
            if len(found) == size:
                examples = tuple(example for _, example in found.values())
                self.check(examples)
                yield Window(examples, next(iter(found.values()))[0])
                found = {}

    def texts(self, size: int, examples: int) -> list[str]:
        """Return what a run learned from that read so many examples in windows of a size, each text once."""
        found: dict[str, None] = {}
        for window in islice(self.windows(size), -(-examples // size)):
            if window.start.lap:  # the source is read through, or nearly
                found |= dict.fromkeys(example.text for example in window.examples)
                break
            found |= dict.fromkeys(example.text for example in window.examples)
        return list(found)

    def _examples(self, start: Position) -> Iterator[tuple[Position, Row, Example]]:
        for lap in count(start.lap):
            skipped = start.records if lap == start.lap else 0
            is_empty = True
            rows = ((at, row) for at, row in self._wanted(lap, skipped) if at >= start)
            while part := list(islice(rows, _AT_ONCE)):
                for (at, row), example in self._encoded(part):
                    is_empty = False
                    yield at, row, example
            if is_empty and not skipped:
                raise DataError(f"{self.config.source}: has no row to learn from; widen the filters")

    def _wanted(self, lap: int, skipped: int) -> Iterator[tuple[Position, Row]]:
        """Yield the rows of the training split that pass the filters, of one lap, and where they stand."""
        label, last, before = kept_label(self.config), 0, 0
        for row in rows_behind(self.config, skipped):
            before = before + 1 if row.number == last else 0
            last = row.number
            clean = clean_row(row) if self.config.clean_html else row
            if split_of(clean, self.config.shares) is Split.TRAIN and filter_rows([clean], self.config, label).rows:
                yield Position(lap, row.number - 1, before), clean

    def _encoded(self, rows: Sequence[tuple[Position, Row]]) -> Iterable[tuple[tuple[Position, Row], Example]]:
        """Encode rows together; one by one where nothing learned remains of some, to know which those are."""
        examples = self.encode([row for _, row in rows]).examples
        if len(examples) == len(rows):
            return zip(rows, examples, strict=True)
        return ((placed, example) for placed in rows for example in self.encode([placed[1]]).examples)


class Place(NamedTuple):
    """Where an example is read: in which batch of the run, counted from 0, and in which row of it."""

    batch: int
    row: int


class StreamSampler(Sampler[list[Place]]):
    """The batches of a run: which places of each one of several processes reads.

    Args:
        batches: how many.
        batch_size: rows of one, of all processes together.
        rank: of the process, counted from 0.
        num_replicas: how many processes there are.

    Raises:
        ConfigError: there are more processes than rows in a batch.
    """

    def __init__(self, batches: int, batch_size: int, *, rank: int = 0, num_replicas: int = 1) -> None:
        check_batch_size(batch_size, num_replicas)
        self.batches, self.rows = batches, range(rank, batch_size, num_replicas)

    def __len__(self) -> int:
        """Return the number of batches."""
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: a run reads its stream once."""

    def __iter__(self) -> Iterator[list[Place]]:
        """Yield the places of each batch."""
        for batch in range(self.batches):
            yield [Place(batch, row) for row in self.rows]


class StreamedExamples(Dataset[Example]):
    """The examples of a stream by their places in a run, one window held at a time.

    Args:
        stream: where they come from.
        config: the recipe's training section.
        record: the file that says where windows began. With it a resumed run need not read what it has read before,
            and learns if the source has changed meanwhile.
        writes: whether to write it; of several processes one does.
    """

    def __init__(self, stream: TrainingStream, config: TrainConfig, record: Path, *, writes: bool = True) -> None:
        self.stream, self._config, self._record, self._writes = stream, config, record, writes
        self.size = window_size(stream.config, config)
        self._begun: list[tuple[Position, str]] = []
        if record.is_file():
            self._begun = [(Position(*start), digest) for start, digest in read_json(record)]
        self._coming: Generator[Window] | None = None
        self._next = -1  # the number of the window that `_coming` yields next; none so far
        self._held = -1
        self._examples: tuple[Example, ...] = ()
        self._order: list[int] = []

    def __len__(self) -> int:
        """Return the examples a run reads."""
        return self._config.steps * self._config.accumulation * self._config.batch_size

    def __getitem__(self, place: Place) -> Example:
        """Return an example, reading its window first if another one is held.

        Raises:
            DataError: the source cannot be read, or is another than when the run began.
        """
        number, batch = divmod(place.batch, self.size // self._config.batch_size)
        if number != self._held:
            self._hold(number)
        return self._examples[self._order[batch * self._config.batch_size + place.row]]

    def close(self) -> None:
        """Let go of the source, which is open between windows."""
        if self._coming is not None:
            self._coming.close()
        self._coming, self._next = None, -1

    def _hold(self, number: int) -> None:
        if self._coming is None or number != self._next:
            self.close()
            self._next = min(number, max(0, len(self._begun) - 1))
            start = self._begun[self._next][0] if self._begun else None
            self._coming = self.stream.windows(self.size, start)
        while self._next <= number:
            window = next(self._coming)
            self._remember(self._next, window)
            self._next += 1
        sampler = LengthGroupedSampler(
            [example.num_tokens for example in window.examples],
            batch_size=self._config.batch_size,
            seed=self._config.seed,
            group_by_length=self._config.group_by_length,
        )
        sampler.set_epoch(number)
        self._held, self._examples, self._order = number, window.examples, list(sampler)

    def _remember(self, number: int, window: Window) -> None:
        """Write down where a window began; if that is known, it must be as it was. All processes read the same."""
        own = (window.start, window.hash)
        (others,) = processes.totals(own != processes.from_first(own))
        if others:
            raise DataError(
                f"{self.stream.config.source}: the processes of this run read different rows; give all the same source"
            )
        if number < len(self._begun):
            if self._begun[number] != own:
                raise DataError(
                    f"{self.stream.config.source}: its rows from {window.start.records + 1} on are other ones than "
                    "when this run read them; start again with --overwrite"
                )
            return
        self._begun.append(own)
        if self._writes:
            write_json(self._record, self._begun)


def window_size(data: DataConfig, train: TrainConfig) -> int:
    """Return the examples of a window: `data.stream_window`, in whole batches."""
    return max(1, data.stream_window // train.batch_size) * train.batch_size
