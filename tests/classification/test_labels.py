"""Labels of many texts equal those of each text alone, whatever stands beside it in the batch."""

import dataclasses
import inspect

import pytest
import torch
from transformers import BertConfig, BertModel

from prefixkit.classification import classify, hidden_at, tag
from prefixkit.config import Pooling, validate_recipe
from prefixkit.errors import ArtefactError, DataError
from prefixkit.injection import attach
from prefixkit.models import Base
from prefixkit.models.fingerprint import fingerprint
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, Head, HeadKind, Prefix, PrefixStates, SiteStates, TrainingCard

TEXTS = ["the film was great", "dull", "i loved it and the story was good and fun", "the plot was awful"]


@pytest.fixture(params=["bert", "llama"])
def base(request, make_tiny_llama, tiny_tokenizer):
    if request.param == "llama":
        model = make_tiny_llama().double()
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = BertConfig(vocab_size=len(tiny_tokenizer), hidden_size=16, num_hidden_layers=2,
                                num_attention_heads=2, intermediate_size=16, max_position_embeddings=64,
                                initializer_range=0.3)  # fmt: skip
            model = BertModel(config, add_pooling_layer=False).double().eval()
    return Base("tiny", model.requires_grad_(False), tiny_tokenizer, torch.float64, "none")


def make_prefix(base, seed, labels=("bad", "good"), kind=HeadKind.SEQUENCE, length=3, pooling=Pooling.TOKEN):
    dice = torch.Generator().manual_seed(seed)
    geometry = inspect_model(base.model).geometry
    sites = tuple(
        SiteStates(*(2 * torch.randn(site.kv_heads, length, site.head_dim, generator=dice).double() for _ in "kv"))
        for site in geometry.sites
    )
    size = base.model.config.hidden_size
    weight = 0.1 * torch.randn(len(labels), size, generator=dice).double()
    head = Head(kind, labels, weight, torch.randn(len(labels), generator=dice).double(), pooling)
    card = BaseCard(id="tiny", fingerprint=fingerprint(base.model))
    return Prefix.from_states(PrefixStates(geometry, sites), base=card, head=head)


def slow(base, text, prefix):
    """One text, unpadded, through the model and the head by hand."""
    ids = base.tokenizer(text)["input_ids"]
    if not base.reads_both_ways and prefix.head.pooling is not Pooling.LAST:
        ids = [*ids, base.tokenizer.eos_token_id]
    stack = inspect_model(base.model).stack
    with torch.no_grad(), attach(base.model, prefix):
        states = stack(input_ids=torch.tensor([ids]))[0][0]  # [t, e]
    place = 0 if base.reads_both_ways and prefix.head.pooling is Pooling.TOKEN else -1
    hidden = states.mean(0) if prefix.head.pooling is Pooling.MEAN else states[place]
    logits = prefix.head.weight @ hidden + prefix.head.bias
    exponents = logits.exp()
    return dict(zip(prefix.head.labels, (exponents / exponents.sum()).tolist(), strict=True))


def close(one, other):
    assert one.keys() == other.keys()
    assert max(abs(one[key] - other[key]) for key in one) < 1e-10


@pytest.mark.parametrize("pooling", Pooling)
def test_a_batch_gives_what_each_text_gives_alone(base, pooling):
    prefix = make_prefix(base, 1, pooling=pooling)
    found = classify(base, TEXTS, prefix, batch_size=3)
    for text, own in zip(TEXTS, found, strict=True):
        close(own.probabilities, slow(base, text, prefix))
        assert own.label == max(own.probabilities, key=own.probabilities.get)
        assert not own.is_cut
    assert len({round(own.probabilities["good"], 6) for own in found}) == len(TEXTS)


def test_texts_of_different_tasks_share_a_batch(base):
    mean = make_prefix(base, 3, pooling=Pooling.MEAN)
    tasks = [make_prefix(base, 1), make_prefix(base, 2, ("x", "y", "z"), length=5), mean]
    rows = [tasks[0], tasks[1], tasks[2], tasks[1]]
    for text, task, own in zip(TEXTS, rows, classify(base, TEXTS, rows), strict=True):
        close(own.probabilities, slow(base, text, task))


def test_nothing_is_left_attached(base):
    before = base.model.config._attn_implementation
    classify(base, TEXTS, [make_prefix(base, 1)] * 4)
    assert base.model.config._attn_implementation == before


def test_a_long_text_is_cut_and_says_so(base):
    prefix = make_prefix(base, 1)
    found = classify(base, [TEXTS[2], TEXTS[1]], prefix, max_tokens=4)
    assert [own.is_cut for own in found] == [True, False]
    kept = 4 if base.reads_both_ways else 3  # the end of text takes one place
    close(found[0].probabilities, slow(base, " ".join(TEXTS[2].split()[:kept]), prefix))


def test_probabilities_of_a_head_in_bfloat16_sum_to_one(base):
    prefix = make_prefix(base, 1, ("a", "b", "c", "d", "e", "f", "g"))
    head = prefix.head
    rough = Head(head.kind, head.labels, head.weight.bfloat16(), head.bias.bfloat16(), head.pooling)
    for own in classify(base, TEXTS, dataclasses.replace(prefix, head=rough)):
        assert sum(own.probabilities.values()) == pytest.approx(1, abs=1e-6)


def test_no_texts_have_no_labels(base):
    assert classify(base, [], make_prefix(base, 1)) == []


def test_words_get_the_labels_of_their_first_tokens(base):
    prefix = make_prefix(base, 1, ("O", "B-GOOD", "I-GOOD"), HeadKind.TOKEN)
    rows = [text.split() for text in TEXTS]
    stack = inspect_model(base.model).stack
    for words, own in zip(rows, tag(base, rows, prefix), strict=True):
        ids = base.tokenizer.convert_tokens_to_ids(words)
        with torch.no_grad(), attach(base.model, prefix):
            probabilities = prefix.head(stack(input_ids=torch.tensor([ids]))[0][0]).softmax(-1)
        assert [each.word for each in own] == words
        for each, row in zip(own, probabilities, strict=True):
            assert each.label == prefix.head.labels[int(row.argmax())]
            assert each.probability == pytest.approx(float(row.max()), abs=1e-10)


def test_words_that_are_cut_off_have_no_label(base):
    prefix = make_prefix(base, 1, ("O", "B-GOOD"), HeadKind.TOKEN)
    words = TEXTS[2].split()
    own = tag(base, [words], prefix, max_tokens=3)[0]
    assert [each.label is None for each in own] == [False] * 3 + [True] * (len(words) - 3)


def test_the_wrong_head_or_none_is_refused(base):
    tagger, plain = make_prefix(base, 1, ("O", "B-X"), HeadKind.TOKEN), make_prefix(base, 2)
    plain = Prefix.from_states(plain.states, base=plain.card.base)
    for wrong in (tagger, plain, [tagger]):
        with pytest.raises(
            ArtefactError, match=r"^the artefact of tiny has no head for whole texts \(data.format classes\)"
        ):
            classify(base, TEXTS[:1], wrong)
    with pytest.raises(ArtefactError, match=r"has no head for words \(data.format tags\); train one with it$"):
        tag(base, [["film"]], make_prefix(base, 2))


def test_prefixes_must_be_one_or_one_for_each_text(base):
    with pytest.raises(DataError, match=r"^2 prefixes for 4 texts; give one prefix, or one for each text$"):
        classify(base, TEXTS, [make_prefix(base, 1)] * 2)


def test_a_text_beyond_the_context_is_refused(base):
    limit = base.context_tokens
    prefix = make_prefix(base, 1)
    with pytest.raises(DataError, match=rf"^text 2: prefix \d+ \+ text {limit + 1} tokens exceed the model's context"):
        hidden_at(base, [(5, 6), (5,) * (limit + 1)], [[0], [0]], prefix=prefix)


def test_progress_is_told(base):
    told = []
    classify(base, TEXTS, make_prefix(base, 1), batch_size=3, on_progress=lambda *done: told.append(done))
    assert told == [(3, 4), (4, 4)]


def test_half_a_character_is_refused(base):
    with pytest.raises(DataError, match=r"^a text holds half a character \(a lone surrogate\); give it as UTF-8$"):
        classify(base, ["x\ud83d"], make_prefix(base, 1))
    with pytest.raises(DataError, match=r"^a text holds half a character"):
        tag(base, [["x\ud83d"]], make_prefix(base, 1, ("O", "B-X"), HeadKind.TOKEN))


def test_a_length_of_nothing_is_refused(base):
    with pytest.raises(DataError, match=r"^data.max_tokens: 0 leaves no room for text"):
        classify(base, ["film"], make_prefix(base, 1), max_tokens=0)


def test_a_single_text_is_not_taken_for_a_list_of_letters(base):
    inner = inspect.unwrap(classify), inspect.unwrap(tag)
    with pytest.raises(DataError, match=r"^texts: expected a list of texts, got one text; write \[text\]$"):
        inner[0](base, "great film", make_prefix(base, 1))
    with pytest.raises(DataError, match=r"^rows: expected a list of words for each text, got a text; split it"):
        inner[1](base, ["great film"], make_prefix(base, 1, ("O", "B-X"), HeadKind.TOKEN))


def trained_on(prefix, clean_html):
    recipe = validate_recipe({"data": {"clean_html": clean_html}}).model_dump(mode="json")
    training = TrainingCard(recipe=recipe, seed=0, steps=1, data_hash="", trained_parameters=1, base_weights_hash="",
                            versions={})  # fmt: skip
    return dataclasses.replace(prefix, card=prefix.card.model_copy(update={"training": training}))


def test_texts_are_cleaned_as_those_the_prefix_learned_from(base):
    raw, clean = "the film<br /><br />was   great", "the film was great"
    prefix = make_prefix(base, 1)
    cleaning, plain = trained_on(prefix, True), trained_on(prefix, False)
    texts = [raw, clean, raw, clean]
    found = [own.probabilities["good"] for own in classify(base, texts, [cleaning, cleaning, plain, plain])]
    assert found[0] == pytest.approx(found[1], abs=1e-12)
    assert found[3] == pytest.approx(found[1], abs=1e-12)
    assert abs(found[2] - found[3]) > 1e-4
