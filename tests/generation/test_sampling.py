"""Generation against a plain loop over full forward passes, and what must not change it."""

import copy
import dataclasses
import inspect
import threading

import pytest
import torch
import transformers

from prefixkit.config import GenerationConfig
from prefixkit.errors import DataError, InjectionError, ModelError
from prefixkit.generation import generate_texts, sampling, stream_text
from prefixkit.generation.dice import choose, roll
from prefixkit.generation.prompts import encode_prompts
from prefixkit.injection import attach
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import Prefix

PROMPTS = ["review :", "the film was not", "i", "a truly great story with a", "the plot is", "review :"]
SHORT = GenerationConfig(max_new_tokens=9, batch_size=4)


def slow_reference(base, prompt, settings, *, seed, place, prefix=None):
    """One token at a time, the whole text recomputed for each; no cache, no padding, no generate()."""
    ids = encode_prompts(base, [prompt])[0]
    start = len(ids)
    dice = roll(seed, [place], settings.max_new_tokens)
    with torch.no_grad(), attach(base.model, prefix):
        for step in range(settings.max_new_tokens):
            logits = base.model(torch.tensor([ids]), use_cache=False).logits[:, -1].float()
            if settings.temperature == 0:
                token = logits.argmax().item()
            else:
                token = choose(logits / settings.temperature, dice[:, step], top_p=settings.top_p).item()
            ids.append(token)
            if token == base.tokenizer.eos_token_id:
                break
    whole = base.tokenizer.decode(ids, skip_special_tokens=True)
    return whole[len(base.tokenizer.decode(ids[:start], skip_special_tokens=True)) :]


def test_a_models_own_defaults_come_back_when_threads_overlap(base, monkeypatch):
    """The second call begins before the first one ends, and ends after it."""
    model = copy.deepcopy(base.model)
    model.generation_config = own = transformers.GenerationConfig(eos_token_id=[2, 5], temperature=0.3)
    shared = dataclasses.replace(base, model=model)
    generate, first_is_in, second_is_in, first_is_out = type(model).generate, *(threading.Event() for _ in range(3))
    asked = []

    def slow(self, *args, generation_config, **kwargs):
        asked.append(generation_config.eos_token_id)
        if threading.current_thread() is first:
            first_is_in.set()
            assert second_is_in.wait(60)
        else:
            second_is_in.set()
            assert first_is_out.wait(60)
        return generate(self, *args, generation_config=generation_config, **kwargs)

    monkeypatch.setattr(type(model), "generate", slow)
    texts = {}

    def run(name):
        texts[name] = generate_texts(shared, PROMPTS[:2], SHORT, seed=7)

    first, second = (threading.Thread(target=run, args=(name,)) for name in ("first", "second"))
    first.start()
    assert first_is_in.wait(60)
    second.start()
    first.join()
    assert model.generation_config is not own  # somebody generates still
    first_is_out.set()
    second.join()
    assert model.generation_config is own
    assert asked == [[2, 5], [2, 5]]
    assert texts["first"] == texts["second"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("has_prefix", [False, True])
def test_batches_give_what_a_slow_loop_gives(base, prefix, temperature, has_prefix):
    chosen = prefix if has_prefix else None
    settings = SHORT.model_copy(update={"temperature": temperature})
    texts = generate_texts(base, PROMPTS, settings, seed=7, prefix=chosen)
    assert texts == [
        slow_reference(base, prompt, settings, seed=7, place=place, prefix=chosen)
        for place, prompt in enumerate(PROMPTS)
    ]


def test_the_prefix_changes_the_text(base, prefix):
    assert generate_texts(base, PROMPTS, SHORT, seed=7) != generate_texts(base, PROMPTS, SHORT, seed=7, prefix=prefix)


def test_the_head_always_reads_contiguous_states(base, prefix):
    """A batch of prompts reaches the head as a slice, for which torch copies the head's weight once per row.

    On the packaged model and 64 rows that copy is 3.6 GB and takes 6 seconds.
    """
    seen = []
    hook = base.model.get_output_embeddings().register_forward_hook(lambda _, read, __: seen.append(read[0]))
    generate_texts(base, PROMPTS, SHORT, seed=7, prefix=prefix)
    hook.remove()
    assert max(len(states) for states in seen) > 1
    assert all(states.is_contiguous() for states in seen)


def test_the_same_prompt_twice_gives_two_texts(base):
    texts = generate_texts(base, ["review :"] * 6, SHORT, seed=0)
    assert len(set(texts)) > 1


@pytest.mark.parametrize("batch_size", [1, 2, 6, 50])
def test_texts_do_not_depend_on_the_batch_size(base, prefix, batch_size):
    settings = SHORT.model_copy(update={"batch_size": batch_size})
    assert generate_texts(base, PROMPTS, settings, seed=3, prefix=prefix) == generate_texts(
        base, PROMPTS, SHORT, seed=3, prefix=prefix
    )


def test_the_global_generator_is_neither_read_nor_changed(base):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate_texts(base, PROMPTS, SHORT, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert generate_texts(base, PROMPTS, SHORT, seed=0) == first
    assert generate_texts(base, PROMPTS, SHORT, seed=1) != first


def test_the_models_own_generation_defaults_do_not_leak_in(base):
    plain = generate_texts(base, PROMPTS, SHORT, seed=0)
    odd = copy.deepcopy(base.model)
    odd.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.1, repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=9,
        suppress_tokens=list(range(10, 40)), max_length=3, num_beams=3, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    own = odd.generation_config
    assert generate_texts(dataclasses.replace(base, model=odd), PROMPTS, SHORT, seed=0) == plain
    assert odd.generation_config is own
    assert own.no_repeat_ngram_size == 1


def test_a_text_ends_at_the_end_token_the_models_files_name(base):
    settings = GenerationConfig(max_new_tokens=20, temperature=0)
    words = generate_texts(base, ["the"], settings, seed=0)[0].split()
    stop = base.tokenizer.convert_tokens_to_ids(words[3])
    base.model.generation_config.eos_token_id = [2, stop]
    ended = generate_texts(base, ["the"], settings, seed=0)[0].split()
    assert ended == words[: words.index(words[3]) + 1]


def test_special_tokens_are_stripped_and_the_prompt_is_not_repeated(base):
    for prompt, text in zip(PROMPTS, generate_texts(base, PROMPTS, SHORT, seed=5), strict=True):
        assert "<" not in text
        assert not text.startswith(prompt)


def test_an_empty_prompt_starts_from_bos(base):
    assert encode_prompts(base, [""]) == [[base.tokenizer.bos_token_id]]
    assert generate_texts(base, [""], SHORT, seed=0)[0]


def test_an_empty_prompt_without_bos_is_an_error(base):
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(
        DataError, match=r"^an empty prompt starts from the BOS token, and the tokenizer of tiny has none"
    ):
        generate_texts(dataclasses.replace(base, tokenizer=tokenizer), [""], SHORT, seed=0)


def test_a_text_that_would_leave_the_context_is_refused_with_the_numbers(base, prefix):
    settings = GenerationConfig(max_new_tokens=122)
    expected = (
        r"^prefix 5 \+ prompt 2 \+ 122 new tokens exceed the model's context of 128; "
        r"shorten the prompt or lower generation.max_new_tokens$"
    )
    with pytest.raises(DataError, match=expected):
        generate_texts(base, ["review :"], settings, seed=0, prefix=prefix)
    with pytest.raises(DataError, match=r"^prompt 7 \+ 122 new tokens exceed"):
        stream_text(base, "a b c d e f g", settings, seed=0)


def test_the_longest_text_that_fits_is_generated(base, prefix):
    settings = GenerationConfig(max_new_tokens=121)
    base.model.generation_config.eos_token_id = None
    assert generate_texts(base, ["review :"], settings, seed=0, prefix=prefix)[0]


def test_a_tokenizer_that_cannot_pad_is_refused(base):
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match=r"^tiny: its tokenizer has no padding token; set pad_token in it$"):
        generate_texts(dataclasses.replace(base, tokenizer=tokenizer), ["a"], SHORT, seed=0)


def test_progress_counts_texts(base):
    calls = []
    generate_texts(base, PROMPTS, SHORT, seed=0, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(4, 6), (6, 6)]


def test_no_prompts_no_texts(base):
    assert generate_texts(base, [], SHORT, seed=0) == []


@pytest.mark.parametrize("has_prefix", [False, True])
def test_streamed_pieces_joined_are_the_text(base, prefix, has_prefix):
    chosen = prefix if has_prefix else None
    for prompt in ("review :", ""):
        pieces = list(stream_text(base, prompt, SHORT, seed=4, prefix=chosen))
        assert len(pieces) > 2
        assert "".join(pieces) == generate_texts(base, [prompt], SHORT, seed=4, prefix=chosen)[0]


def test_the_model_is_free_again_after_a_stream_is_closed_early(base, prefix):
    stream = stream_text(base, "review :", GenerationConfig(max_new_tokens=100), seed=0, prefix=prefix)
    next(stream)
    with pytest.raises(InjectionError, match="attached to this model already"):
        generate_texts(base, ["a"], SHORT, seed=0, prefix=prefix)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefixkit-stream"]
    assert generate_texts(base, ["a"], SHORT, seed=0, prefix=prefix)


def test_closing_a_stream_stops_the_generation(base):
    base.model.generation_config.eos_token_id = None
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.eos_token = None
    steps, heard = [], threading.Event()

    def wait_for_the_reader(*_):
        steps.append(1)
        if len(steps) == 3:
            heard.wait(30)

    inspect_model(base.model)  # looking at a model runs it, too
    base.model.register_forward_pre_hook(wait_for_the_reader)
    endless = dataclasses.replace(base, tokenizer=tokenizer)
    stream = stream_text(endless, "review :", GenerationConfig(max_new_tokens=100), seed=0)
    next(stream)
    threading.Timer(0.2, heard.set).start()  # the model goes on only after the reader has left
    stream.close()
    assert len(steps) <= 4


def test_what_fails_in_the_stream_is_raised_to_its_reader(base, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sampling, "generate_ids", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream_text(base, "review :", SHORT, seed=0))


def test_a_prefix_that_is_not_numbers_is_named_as_the_cause(base, prefix):
    broken = dataclasses.replace(prefix, states=prefix.states.map(lambda tensor: tensor * torch.nan))
    with pytest.raises(ModelError, match="the artefact or the base model is damaged, or the dtype too narrow"):
        list(stream_text(base, "review :", SHORT, seed=0, prefix=broken))


def test_bytes_of_one_character_are_not_sent_before_they_are_complete(base, monkeypatch):
    texts = {1: "a", 2: "a\N{REPLACEMENT CHARACTER}", 3: "aé", 4: "aé!"}
    monkeypatch.setattr(sampling, "_continuation", lambda base, row, new: texts[len(new)])
    queue = sampling.SimpleQueue()
    for item in (5, 6, 7, 8, None):
        queue.put(item)
    assert list(sampling._pieces(base, [1], queue)) == ["a", "é", "!"]


def test_a_single_prompt_is_not_taken_for_a_list_of_letters(base):
    """Users have no type checker at run time, as the tests do."""
    with pytest.raises(DataError, match=r"^prompts: expected a list of prompts, got one text; write \[prompt\]$"):
        inspect.unwrap(generate_texts)(base, "hello", SHORT, seed=0)


def test_texts_with_prefixes_of_their_own_are_those_of_each_alone(base, prefix):
    short = Prefix.from_states(prefix.states.slice((1,) * len(prefix.states.lengths)), base=prefix.card.base)
    rows = [prefix, None, short, prefix, short, None]
    found = generate_texts(base, PROMPTS, SHORT, seed=7, prefix=rows)
    alone = {row: generate_texts(base, PROMPTS, SHORT, seed=7, prefix=row) for row in (prefix, None, short)}
    assert found == [alone[row][place] for place, row in enumerate(rows)]
    assert len({tuple(texts) for texts in alone.values()}) == 3
    assert generate_texts(base, PROMPTS, SHORT, seed=7, prefix=[None] * 6) == alone[None]
    with pytest.raises(DataError, match=r"^prefix: expected one for each of 6 prompts, or one for all, got 2$"):
        generate_texts(base, PROMPTS, SHORT, prefix=[prefix, None])


def test_each_text_needs_room_for_its_own_prefix_alone(base, prefix):
    long = "film " * (base.context_tokens - SHORT.max_new_tokens - 4)
    tokens = len(encode_prompts(base, [long])[0])
    long = "film " * (base.context_tokens - SHORT.max_new_tokens - 4 - (tokens - long.count("film")))
    assert len(generate_texts(base, [long, "i"], SHORT, prefix=[None, prefix])) == 2
    with pytest.raises(DataError, match="exceed the model's context"):
        generate_texts(base, [long, "i"], SHORT, prefix=[prefix, None])


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_prefixes_that_cannot_be_read_together_are_refused_before_a_text_is_written(base, prefix, batch_size):
    infix = Prefix.from_states(prefix.states, base=prefix.card.base, infix=True)
    told = []
    with pytest.raises(InjectionError, match="an infix and a prefix stand at different places"):
        generate_texts(
            base, PROMPTS, SHORT.model_copy(update={"batch_size": batch_size}), prefix=[prefix] * 5 + [infix],
            on_progress=lambda *done: told.append(done),
        )  # fmt: skip
    assert not told


def test_a_run_of_bytes_is_sent_once_no_byte_can_unsay_it(base, monkeypatch):
    """Tokenizers with byte fallback decode a run of bytes as a whole: one too many spoils those before it."""
    texts = {1: "b", 2: "b\N{REPLACEMENT CHARACTER}", 3: "b😀", 4: "b\N{REPLACEMENT CHARACTER}" * 2, 5: "b😀é!"}
    names = {5: "b", 6: "<0xF0>", 7: "<0x9F>", 8: "<0xC3>", 9: "!"}
    monkeypatch.setattr(sampling, "_continuation", lambda base, row, new: texts[len(new)])
    monkeypatch.setattr(base.tokenizer, "convert_ids_to_tokens", names.get, raising=False)
    queue = sampling.SimpleQueue()
    for item in (*names, None):
        queue.put(item)
    assert list(sampling._pieces(base, [1], queue)) == ["b", "😀é!"]
