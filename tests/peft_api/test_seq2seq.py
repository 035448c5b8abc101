"""A script for PEFT's prefix tuning of an encoder-decoder runs: trained, generated with, saved, loaded, resumed."""

import copy
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, GenerationConfig, PreTrainedModel
from transformers import Seq2SeqTrainer as Trainer
from transformers import Seq2SeqTrainingArguments as TrainingArguments

from conformance.encoder_families import ENCODER_DECODERS, ENCODERS, build
from prefixkit import PeftModel, Prefix, PrefixTuningConfig, attach, get_peft_model
from prefixkit.config import Placement
from prefixkit.errors import ArtefactError, ConfigError, UnsupportedModelError
from prefixkit.export import from_peft, to_peft
from prefixkit.models.fingerprint import weights_hash
from prefixkit.models.text_states import text_states
from prefixkit.peft import TaskType

P = 4
PAPER = ["encoder_self", "decoder_self", "cross"]
FAMILIES = ["t5", "bart"]
Batch = dict[str, Tensor]


def made(name: str, **settings: Any) -> PeftModel:
    """A fresh base model with a prefix, moved away from where it starts."""
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        model = get_peft_model(build(ENCODER_DECODERS[name]), config)
        with torch.no_grad():
            for parameter in model.encoder.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def pairs() -> Batch:
    """Three sources, one padded, and their targets."""
    dice = torch.Generator().manual_seed(2)
    ids, labels = (torch.randint(3, 97, (3, tokens), generator=dice) for tokens in (7, 5))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels[2, 3:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("placement", [None, PAPER])
def test_it_trains_where_it_is_asked_to_and_reads_what_attach_reads(
    placement: list[str] | None, name: str, pairs: Batch
) -> None:
    model = made(name, placement=placement)
    base, before = model.base_model, weights_hash(model.base_model)
    geometry = model.encoder.geometry
    wanted = set(placement or ["decoder_self"])
    lengths = tuple(P if site.placement in wanted else 0 for site in geometry.sites)
    assert model.prefix.states.lengths == lengths
    assert model.get_nb_trainable_parameters()[0] == geometry.num_parameters(lengths)

    plain = logits(base, pairs)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        loss = model(**pairs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    found = logits(model, pairs)
    assert (found - plain).abs().max() > 0.1
    with attach(base, model.prefix):
        torch.testing.assert_close(logits(base, pairs), found, rtol=0, atol=1e-10)
    assert torch.equal(logits(base, pairs), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model, pairs), plain)
    assert weights_hash(base) == before


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"placement": PAPER}, {"placement": ["cross"], "prefix_projection": True}])
def test_what_it_saves_loads_with_the_same_text_and_trains_on(
    settings: dict[str, Any], name: str, pairs: Batch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = made(name, **settings)
    source = {key: pairs[key] for key in ("input_ids", "attention_mask")}

    def answers(model: Any) -> Tensor:
        out = model.generate(
            **source, max_new_tokens=6, num_beams=2, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        return torch.stack(out.logits)

    expected = answers(model)
    assert (expected - answers(model.base_model)).abs().max() > 0.1
    logging.getLogger("prefixkit").addHandler(caplog.handler)
    try:
        model.save_pretrained(tmp_path)
    finally:
        logging.getLogger("prefixkit").removeHandler(caplog.handler)
    assert "saved as a prefixkit artefact only: PEFT's format cannot say" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prefix.json", "prefix.safetensors"]
    loaded = PeftModel.from_pretrained(model.base_model, tmp_path)
    assert torch.equal(answers(loaded), expected)
    more = PeftModel.from_pretrained(model.base_model, tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(more, pairs), logits(model, pairs), rtol=0, atol=1e-10)
    more(**pairs).loss.backward()
    assert any(parameter.grad.abs().max() > 1e-4 for parameter in more.encoder.parameters() if parameter.numel())
    config = PrefixTuningConfig.from_pretrained(tmp_path)
    assert (config.task_type, config.num_virtual_tokens) == (TaskType.SEQ_2_SEQ_LM, P)
    assert set(config.placement) == set(settings.get("placement", ["decoder_self"]))
    assert loaded.peft_config["default"].placement == config.placement
    with attach(model.base_model, Prefix.load(tmp_path)):
        assert torch.equal(answers(model.base_model), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(name: str, pairs: Batch) -> None:
    model = made(name, placement=PAPER, prefix_projection=True).train()
    parameters = list(model.encoder.parameters())
    expected = torch.autograd.grad(model(**pairs).loss, parameters)
    model.gradient_checkpointing_enable()
    for ours, theirs in zip(torch.autograd.grad(model(**pairs).loss, parameters), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def trainer(model: Any, rows: list[Any], folder: Path, tokenizer: Any, **options: Any) -> Any:
    arguments = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
        "learning_rate": 0.02, "logging_steps": 1, "save_steps": 2, "report_to": [], "seed": 1, "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False, "lr_scheduler_type": "constant",
    }  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    return Trainer(model, TrainingArguments(**(arguments | options)), collator, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("projection", [False, True])
def test_the_sequence_trainer_trains_resumes_and_generates(
    projection: bool, pairs: Batch, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    settings = {"placement": ["cross", "decoder_self"], "prefix_projection": projection}
    rows = [{key: pairs[key][i].tolist() for key in pairs} for i in range(3)]

    def run(folder: str, resume: bool = False, **options: Any) -> tuple[Any, list[float]]:
        model = made("t5", **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = trainer(model, rows, tmp_path / folder, tiny_tokenizer, **options)
            run.train(resume_from_checkpoint=resume)
        return run, [line["loss"] for line in run.state.log_history if "loss" in line]

    whole, losses = run("whole", predict_with_generate=True)
    assert losses[-1] < losses[0]
    run("cut", max_steps=2)
    resumed, _ = run("cut", resume=True)
    assert resumed.model.prefix.states.equals(whole.model.prefix.states)
    model = whole.model
    loaded = PeftModel.from_pretrained(model.base_model, tmp_path / "whole" / "checkpoint-4")
    assert loaded.prefix.states.equals(model.prefix.states)

    model.generation_config = GenerationConfig.from_dict(
        model.generation_config.to_dict() | {"max_length": 4, "num_beams": 2}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predicted = torch.as_tensor(whole.predict(rows).predictions)
    expected = model.generate(input_ids=pairs["input_ids"], attention_mask=pairs["attention_mask"])
    assert expected.shape[1] <= 4
    assert torch.equal(predicted, expected)


def test_a_resumed_run_with_another_placement_is_refused() -> None:
    """Decoder self- and cross-attention are of one size, so that nothing else would notice."""
    state = made("t5", placement=["cross"], prefix_projection=True).state_dict()
    own = made("t5", prefix_projection=True)
    with pytest.raises(
        ConfigError, match="placement: the saved prefix stands in other attention stacks; make this one"
    ):
        own.load_state_dict(state)
    again = made("t5", placement=["cross"], prefix_projection=True)
    again.load_state_dict(state)


def test_it_starts_from_the_text_it_is_given() -> None:
    base = build(ENCODER_DECODERS["t5"])
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, placement=PAPER)
    found = get_peft_model(base, config, init_token_ids=[9, 20, 33]).prefix.states
    for ours, theirs in zip(found.sites, text_states(base, torch.tensor([9, 20, 33])).sites, strict=True):
        torch.testing.assert_close(ours.key.double(), theirs.key, rtol=0, atol=1e-6)  # float32
    whisper = build(ENCODER_DECODERS["whisper"])
    with pytest.raises(
        ConfigError, match="init_weights: WhisperFor.* reads input_features, no words a prefix could sta"
    ):
        get_peft_model(whisper, config)
    random = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, init_weights="random")
    assert get_peft_model(whisper, random).prefix.states.num_virtual_tokens == 3


def test_arguments_that_peft_orders_otherwise_go_by_name(pairs: Batch) -> None:
    model = made("t5")
    with pytest.raises(TypeError, match="positional arguments"):
        model(pairs["input_ids"], pairs["attention_mask"], pairs["labels"])
    decoder = {"decoder_input_ids": pairs["input_ids"][:, :3], "decoder_attention_mask": pairs["attention_mask"][:, :3]}
    source = {key: pairs[key] for key in ("input_ids", "attention_mask")}
    with attach(model.base_model, model.prefix):
        expected = logits(model.base_model, source | decoder)
    assert torch.equal(logits(model, source | decoder), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"placement": ["encoder"]},
            "placement: expected decoder_self, encoder_self, cross, got encoder; did you mean",
        ),
        ({"placement": "cross"}, "placement: expected a list of decoder_self, encoder_self, cross, got 'cross'"),
        ({"placement": []}, "placement: expected a list of decoder_self, encoder_self, cross, got []"),
        ({"num_transformer_submodules": 3}, "num_transformer_submodules=3: "),
        (
            {"task_type": "CAUSAL_LM", "placement": ["cross"]},
            "placement: a decoder-only model has decoder_self attention alone; leave it out",
        ),
        ({"num_layers": 3}, "num_layers: this model has 2, got 3; leave it out"),
        ({"num_attention_heads": 2}, "num_attention_heads: this model has 4, got 2; leave it out"),
        ({"task_type": "CAUSAL_LM"}, "task_type: expected SEQ_2_SEQ_LM for T5ForConditionalGeneration, got CAUSAL_LM"),
    ],
)
def test_what_means_nothing_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        get_peft_model(build(ENCODER_DECODERS["t5"]), PrefixTuningConfig(**{"task_type": "SEQ_2_SEQ_LM"} | arguments))


def test_pefts_own_configuration_is_understood() -> None:
    theirs = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=7, num_transformer_submodules=2)
    ours = PrefixTuningConfig(**vars(theirs) | {"peft_type": theirs.peft_type})
    assert (ours.task_type, ours.num_virtual_tokens, ours.placement) == (TaskType.SEQ_2_SEQ_LM, 7, None)
    assert PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", placement=[Placement.CROSS]).placement == (Placement.CROSS,)


def test_decoder_only_models_are_of_the_other_task(base: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="task_type: expected CAUSAL_LM for LlamaForCausalLM, got SEQ_2_SEQ_LM"):
        get_peft_model(base, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM"))


def test_encoders_are_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    model = build(ENCODERS["bert"], AutoModelForMaskedLM)
    for task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        with pytest.raises(
            UnsupportedModelError, match="BertForMaskedLM: PEFT's names are offered for decoder-only mode"
        ):
            get_peft_model(model, PrefixTuningConfig(task_type=task))
    with pytest.raises(UnsupportedModelError, match="and encoder-decoders; use prefixkit.attach"):
        PeftModel.from_pretrained(model, tmp_path)


def test_pefts_files_are_refused_by_name(base: PreTrainedModel, tmp_path: Path) -> None:
    """PEFT's layers i and i + l/2 share what is trained, which is not this prefix."""
    settings: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": P}
    model = build(ENCODER_DECODERS["t5"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(copy.deepcopy(model), peft.PrefixTuningConfig(**settings)).save_pretrained(tmp_path / "t5")
    for read in (lambda: PeftModel.from_pretrained(model, tmp_path / "t5"), lambda: from_peft(tmp_path / "t5", model)):
        with pytest.raises(ArtefactError, match="got SEQ_2_SEQ_LM; in an encoder-decoder PEFT lets layers share their"):
            read()
    with pytest.raises(ArtefactError, match="got SEQ_2_SEQ_LM; in an encoder-decoder PEFT lets layers share"):
        PrefixTuningConfig.from_pretrained(tmp_path / "t5")


def test_a_decoders_checkpoint_that_happens_to_fit_an_encoder_decoder_is_refused(
    make_tiny_llama: Any, tmp_path: Path
) -> None:
    llama = make_tiny_llama(num_hidden_layers=3, num_key_value_heads=4)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    to_peft(get_peft_model(llama, config).prefix, tmp_path, llama)
    t5 = build(ENCODER_DECODERS["t5"], num_layers=1, num_decoder_layers=1)  # three attentions of 4 heads of 8
    for read in (lambda: from_peft(tmp_path, t5), lambda: PeftModel.from_pretrained(t5, tmp_path)):
        with pytest.raises(ArtefactError, match="models can be exchanged; T5ForConditionalGeneration is none"):
            read()


def test_a_configuration_given_on_loading_is_compared_whatever_its_order(tmp_path: Path) -> None:
    t5 = build(ENCODER_DECODERS["t5"])
    places = ["encoder_self", "decoder_self", "cross"]
    get_peft_model(
        t5, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, placement=places)
    ).save_pretrained(tmp_path)

    def load(placement: list[str] | None) -> PeftModel:
        config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, placement=placement)
        return PeftModel.from_pretrained(t5, tmp_path, config=config)

    assert load(places[::-1]).active_peft_config.num_virtual_tokens == 4
    with pytest.raises(ConfigError, match="config: placement is decoder_self, that of the saved prefix cross, "):
        load(None)
