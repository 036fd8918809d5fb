"""A Whisper with one layer and random weights, as CTranslate2 has it, and a recording of a tone."""

from __future__ import annotations

import io
import json
import math
import struct
import wave
from pathlib import Path

LANGUAGES = ("en", "de", "zh")
SAMPLES_PER_S = 16_000


def write(folder: Path, *, is_english_only: bool = False) -> Path:
    """A folder that faster-whisper loads; its words are noise."""
    import torch
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor
    from transformers import WhisperForConditionalGeneration as Whisper

    special = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{name}|>" for name in LANGUAGES), "<|translate|>"]
    special += ["<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    times = [f"<|{i * 0.02:.2f}|>" for i in range(1501)]
    # faster-whisper looks up how these four are spelt, to leave them out of a text.
    spelt = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ-", "Ġ'"]
    if not is_english_only:
        spelt.append("")  # by this one CTranslate2 knows a Whisper of many languages
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*spelt, *special, *times]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "-"), ("Ġ", "'")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(times)
    end = vocabulary["<|endoftext|>"]
    config = WhisperConfig(
        vocab_size=len(vocabulary), num_mel_bins=80, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_source_positions=1500, max_target_positions=448, pad_token_id=end, bos_token_id=end, eos_token_id=end,
        decoder_start_token_id=vocabulary["<|startoftranscript|>"], suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Whisper(config)
    generation = model.generation_config
    generation.lang_to_id = {f"<|{name}|>": vocabulary[f"<|{name}|>"] for name in LANGUAGES}
    generation.suppress_tokens, generation.begin_suppress_tokens = [], [end]
    generation.no_timestamps_token_id = vocabulary["<|notimestamps|>"]
    generation.alignment_heads, generation.is_multilingual = [[0, 0]], True
    source = folder.parent / f"{folder.name}-source"
    model.save_pretrained(source)
    WhisperFeatureExtractor().save_pretrained(source)
    tokenizer.save(str(source / "tokenizer.json"))
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"), unk_token=special[0], bos_token=special[0], eos_token=special[0]
    )
    fast.save_pretrained(source)
    files = ["tokenizer.json", "preprocessor_config.json"]
    TransformersConverter(str(source), copy_files=files).convert(str(folder), force=True)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"lang_ids": sorted(generation.lang_to_id.values())}))
    return folder


def recording(seconds: int = 2) -> bytes:
    """A WAV file with a tone."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLES_PER_S)
        turns = (2 * math.pi * 440 * i / SAMPLES_PER_S for i in range(SAMPLES_PER_S))
        file.writeframes(seconds * b"".join(struct.pack("<h", int(8000 * math.sin(turn))) for turn in turns))
    return stream.getvalue()
