"""A llama of half a megabyte with random weights: a real llama.cpp server loads it and answers, in letters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

WIDTH, FEED_FORWARD, LAYERS, HEADS, N_CONTEXT = 64, 128, 2, 4, 512
# Any text is spelled with these; what the model says is one of them for each token.
WORDS = ("▁", "▁the", "▁red", "▁fox", "▁moon", "▁sees", ".", ",", *"abcdefghijklmnopqrstuvwxyz")
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def write(path: Path) -> Path:
    """The GGUF file, written anew: the same every time."""
    rng = np.random.default_rng(0)
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    tokens += [word.encode() for word in WORDS]
    kinds += [TokenType.NORMAL] * len(WORDS)
    writer = GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(N_CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(WORDS))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.normal(0, 0.2, (rows, columns)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values)

    def ones(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))

    matrix("token_embd", len(tokens), WIDTH)
    ones("output_norm")
    matrix("output", len(tokens), WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        ones(f"{block}.attn_norm")
        ones(f"{block}.ffn_norm")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"{block}.{part}", WIDTH, WIDTH)
        matrix(f"{block}.ffn_gate", FEED_FORWARD, WIDTH)
        matrix(f"{block}.ffn_up", FEED_FORWARD, WIDTH)
        matrix(f"{block}.ffn_down", WIDTH, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
