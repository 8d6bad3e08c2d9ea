"""Tiny checkpoints with a tokenizer, in the layouts of the published ones."""

import functools
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox doesn't jump over 12 lazy dogs; it's asleep.\n\nWhy? Because!\n",
    "def square(x):\n    return x ** 2\n\nprint(square(3))\r\n",
    "user assistant system helpful You are a helpful assistant.\n",
    "<|a|> <|b|>",
    "1234 2024 12 12 in 2024; 12 and 34\n\n\n\n  1234",
    "Caf\u00e9 na\u00efve \u4f60\u597d\uff0c\u4e16\u754c \u043c\u0438\u0440",
] * 4
CUTS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLADA_ADDED = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "<|reserved_token_0|>", "<|mdm_mask|>", "<role>", *HEADERS]
DREAM_ADDED = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<tool_call>",
    "<|beginoftext|>",
    "<|mask|>",
]


def trained_backend() -> tokenizers.Tokenizer:
    """A byte-level BPE without added tokens; learned on uncut text, so that a missing cut shows in the ids."""
    return tokenizers.Tokenizer.from_str(_trained_backend())


@functools.cache
def _trained_backend() -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    cuts = pre_tokenizers.Split(Regex(CUTS), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([cuts, byte_level])
    return backend.to_str()


def added_tokens_decoder(names: list[str], first: int) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {str(first + i): {"content": name, "special": name != "<tool_call>"} | flags for i, name in enumerate(names)}


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    write_json(file, {key: value for key, value in content.items() if value is not None})


def write_llada(directory: Path, names: list[str] = LLADA_ADDED) -> Path:
    """The published layout: no mask_token in the config, all added tokens in tokenizer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    backend = trained_backend()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    (directory / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    first = backend.get_vocab_size(with_added_tokens=False)
    config = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    write_json(
        directory / "tokenizer_config.json", config | {"added_tokens_decoder": added_tokens_decoder(names, first)}
    )
    return directory


def write_dream(directory: Path, names: list[str] = DREAM_ADDED) -> Path:
    """The published layout: vocab.json and merges.txt, added tokens in the config only."""
    directory.mkdir(parents=True, exist_ok=True)
    model = json.loads(trained_backend().to_str())["model"]
    write_json(directory / "vocab.json", model["vocab"])
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "added_tokens_decoder": added_tokens_decoder(names, len(model["vocab"])),
    }
    write_json(directory / "tokenizer_config.json", config)
    return directory


def library_reading(directory: Path) -> tokenizers.Tokenizer:
    """The library's own reading of a tokenizer.json, which turns the text of a special token into its id."""
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
