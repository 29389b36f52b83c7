"""Tiny GGUF files, as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from conftest import CHAT_TEMPLATE, VOCABULARY, make_tokenizer, tiny_config

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_tensors(model) -> dict[str, np.ndarray]:
    """A llama's weights under GGUF's names, the rows of q and k in llama.cpp's rotary order."""
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(model.config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in GGUF_NAMES.items()}
    tensors = {}
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if heads := {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2]):
            halves = values.reshape(heads, 2, len(values) // heads // 2, -1)
            values = halves.swapaxes(1, 2).reshape(values.shape)
        tensors[f"{names[name.removesuffix('.weight')]}.weight"] = np.ascontiguousarray(values)
    return tensors


def add_gguf_tokenizer(writer, splitting: str) -> None:
    """The byte-level tokenizer of the other tests, and merges that tell how digits are split.

    Two merges, since transformers 5.17 takes a single one for a text.
    """
    from gguf import TokenType

    plain = sorted(make_tokenizer().get_vocab().items(), key=lambda item: item[1])
    words = [word for word, _ in plain] + ["12", "34"]
    kinds = [TokenType.CONTROL if word.startswith("<|") else TokenType.NORMAL for word in words]
    unused = range(VOCABULARY - len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(words + [f"<unused{number}>" for number in unused])
    writer.add_token_types(kinds + [TokenType.UNUSED for _ in unused])
    writer.add_token_merges(["1 2", "3 4"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_gguf(path: Path, splitting: str = "smollm", left_out: str = ""):
    """A tiny llama as a GGUF file; returns the model that is in it."""
    import gguf
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("checkpoint of run 7")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    add_gguf_tokenizer(writer, splitting)
    for name, values in gguf_tensors(model).items():
        if name != left_out:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
