"""A GGUF file of a few kilobytes, written from a tiny random Llama."""

import gguf
import pytest
import torch

BYTES = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["Ġ"]
MERGES = ["t h", "th e", "Ġ the", "i n"]
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, *[merge.replace(" ", "") for merge in MERGES]]


def interleave(weight, heads):
    """GGUF keeps the rotary halves of each Llama head interleaved."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="session")
def tiny_gguf_model(make_tiny_llama):
    """What `tiny_gguf` holds; the width is a multiple of 32, as the format wants."""
    return make_tiny_llama(vocab_size=len(TOKENS), tie_word_embeddings=True, pad_token_id=None, rms_norm_eps=2.0**-17)


@pytest.fixture(scope="session")
def write_gguf(tiny_gguf_model):
    """A function that writes `tiny_gguf_model` to a path, leaving out the tensors named in `without`."""

    def write(path, *, architecture="llama", without=()):
        config, state = tiny_gguf_model.config, tiny_gguf_model.state_dict()
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_name("tiny")
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_chat_template("{{ messages[0]['content'] }}")
        names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        inside = {
            "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
        }  # fmt: skip
        for layer in range(config.num_hidden_layers):
            for ours, theirs in inside.items():
                names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
        for name, stored in names.items():
            weight = state[name].to(torch.float32).numpy()
            if "q_proj" in name:
                weight = interleave(weight, config.num_attention_heads)
            if "k_proj" in name:
                weight = interleave(weight, config.num_key_value_heads)
            if stored not in without:
                writer.add_tensor(stored, weight.copy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="session")
def tiny_gguf(write_gguf, tmp_path_factory):
    """A whole file, in a folder with a space in its name."""
    return write_gguf(tmp_path_factory.mktemp("gguf files") / "tiny.gguf")
