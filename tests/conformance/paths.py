"""The ways a model can be called that the suite tries, in the order of the page in the docs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Path:
    """One way: what the page calls it, and how a cell is judged."""

    title: str
    judged: str


PATHS: dict[str, Path] = {
    "forward": Path("Forward and gradients", "logits, and gradients of prefix and inputs, against the loops; "
                    "padding left, right, none, mask given or not, sdpa and eager"),
    "mixed": Path("Mixed rows", "prefixes of different lengths, a gate, and none, in one padded batch, in two orders, "
                  "against the loops"),
    "text": Path("States of a text", "a text's own keys and values as prefix equal that text as prompt"),
    "cache-oracle": Path("Filled cache", "the prefix as past_key_values gives the same; families without a window"),
    "precision": Path("float32, bfloat16", "against float64 with the same weights; relative error at most 16 units in "
                      "the last place, 40 for encoder-decoders: T5 comes to 19 without a prefix"),
    "checkpointing": Path("Gradient checkpointing", "gradients equal those without it; the reentrant kind is refused"),
    "packed": Path("Packed documents", "position_ids that begin again and use_cache=False, against the loops; with a "
                   "cache transformers itself takes them for one text, with a prefix or without"),
    "greedy": Path("Greedy", "tokens and logits of a mixed, left-padded batch, each row against the loops on that row "
                   "alone, without padding or cache"),
    "beams": Path("Beams", "tokens equal the row alone, scores the loops; several returned per row"),
    "sampling": Path("Sampling", "the logits every token was drawn from, against the loops; several returned per row"),
    "beam-sampling": Path("Beam sampling", "scores of what was drawn, against the loops"),
    "no-cache": Path("use_cache=False", "as greedy"),
    "static": Path("Static cache", "as greedy"),
    "quantised": Path("Quantised cache", "equals the row alone under the same cache"),
    "offloaded": Path("Offloaded cache", "needs CUDA: tokens equal those without; refused where torch finds none"),
    "chunked": Path("Chunked prefill", "as greedy"),
    "continued": Path("Continued cache", "a second generate from the first one's cache, as greedy"),
    "embeds": Path("inputs_embeds", "generate from embeddings, as greedy; encoders: logits against the loops"),
    "assisted": Path("Assisted decoding", "with a smaller model without prefix, and with itself; one row, as greedy"),
    "lookup": Path("Prompt lookup", "one row, as greedy"),
    "guidance": Path("Guidance", "classifier-free guidance with a negative prompt, both sides against the loops"),
    "compiled-forward": Path("torch.compile",
                             "one compiled model under one prefix, another, mixed rows and none equals the model "
                             "not compiled within 1e-5 (its norms run in float32)"),
    "compiled-generate": Path("Compiled generate",
                              "tokens of a static cache with a compiled decoding step equal those without"),
    "pipeline": Path("Pipeline",
                     "tokens of transformers' text-generation pipeline equal generate on each row alone; scores of its "
                     "classification pipelines equal each text alone"),
    "device-map": Path("Device map", "accelerate's hooks on every module, as greedy (encoders: logits); weights "
                       "offloaded"),
    "lora": Path("Beside LoRA", "a PEFT LoRA under the prefix equals its merged weights, against the loops"),
    "placements": Path("Each attention", "encoder self-, decoder self- and cross-attention, each alone and together, "
                       "mixed padded rows, against the loops"),
    "gradients": Path("Gradients", "of the prefix at every site, sdpa and eager, against the loops"),
    "encoded": Path("encoder_outputs", "computed under the same prefix; another's are refused"),
    "generate-batch": Path("Continuous batching", "transformers' generate_batch"),
    "flex": Path("Flex attention", "another attention implementation"),
    "foreign-cache": Path("Foreign cache", "a cache filled under another prefix or none"),
}  # fmt: skip
