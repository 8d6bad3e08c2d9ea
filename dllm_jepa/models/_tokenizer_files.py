"""The tokenizer files of a checkpoint: found, checked and read.

Only JSON and text files are read: no code of the checkpoint is run and nothing is unpickled. Special tokens are found
by name, because their ids differ between checkpoints of one family.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models._json import read_json_object

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
SPECIAL_MAP_NAME = "special_tokens_map.json"
ADDED_TOKENS_NAME = "added_tokens.json"
BUILDER_KEY = "dllm_jepa.tokenizer"  # in tokenizer_config.json; the library of the hub passes over it
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# The parts of tokenizer.json: the module that has their types, and the key of the parts that a "Sequence" joins.
_COMPONENTS = {
    "normalizer": (normalizers, "normalizers"),
    "pre_tokenizer": (pre_tokenizers, "pretokenizers"),
    "post_processor": (processors, "processors"),
    "decoder": (decoders, "decoders"),
}


@dataclass(frozen=True)
class SpecialTokens:
    """Names of the special tokens; None where there is none of its own."""

    mask: str
    eos: str
    pad: str | None = None
    bos: str | None = None


def tokenizer_builder(directory: str | Path) -> str | None:
    """Path of the function that makes the tokenizer of a directory, where `Tokenizer.save` has noted it."""
    file = Path(directory) / CONFIG_NAME
    name = read_json_object(file).get(BUILDER_KEY) if file.exists() else None
    return name if isinstance(name, str) else None


def read_special_tokens(directory: Path, backend: tokenizers.Tokenizer, family: SpecialTokens) -> SpecialTokens:
    """Find the names of the special tokens of a checkpoint.

    A name comes from tokenizer_config.json, else special_tokens_map.json, else (if it is in the vocabulary) from the
    family; the mask token at last from the `mask_token_id` of config.json.

    Args:
        directory: the checkpoint.
        backend: its tokenizer.
        family: names that the published checkpoints of the family use.

    Returns:
        Names that are all in the vocabulary.

    Raises:
        CheckpointError: if a named token is not in the vocabulary, no mask or eos token is found, or the mask token is
            also one of the others.
    """
    files = [directory / name for name in (CONFIG_NAME, SPECIAL_MAP_NAME) if (directory / name).exists()]
    sources = {file: read_json_object(file) for file in files}
    found = {}
    for key in ("mask", "eos", "pad", "bos"):
        found[key] = _named_token(sources, f"{key}_token", backend)
        default = getattr(family, key)
        if found[key] is None and default is not None and backend.token_to_id(default) is not None:
            found[key] = default
    mask, eos = found["mask"] or _mask_by_id(directory, backend), found["eos"]
    if mask is None:
        raise CheckpointError(
            f"tokenizer without a mask token: {directory / CONFIG_NAME} names no mask_token, {family.mask!r} is not in "
            f"the vocabulary and {directory / 'config.json'} has no mask_token_id that is the id of a token. Use the "
            f'tokenizer files of a masked diffusion checkpoint, or name its token under "mask_token" in {CONFIG_NAME}'
        )
    if eos is None:
        raise CheckpointError(
            f"tokenizer without an eos token: {directory / CONFIG_NAME} names no eos_token and {family.eos!r} is not "
            f'in the vocabulary; name it under "eos_token" in {CONFIG_NAME}'
        )
    if same := [key for key in ("eos", "pad", "bos") if found[key] == mask]:
        raise CheckpointError(f"{directory}: {mask!r} is both the mask token and the {same[0]} token; they must differ")
    return SpecialTokens(mask=mask, eos=eos, pad=found["pad"], bos=found["bos"])


def _named_token(sources: Mapping[Path, Mapping[str, Any]], key: str, backend: tokenizers.Tokenizer) -> str | None:
    """The token that the first file with this key names, as a string or as an object with its content."""
    for file, values in sources.items():
        value = values.get(key)
        if value is None:
            continue
        name = value.get("content") if isinstance(value, dict) else value
        if not isinstance(name, str):
            raise CheckpointError(f"{file}: {key} is {value!r}; it must be a token or an object with its 'content'")
        if backend.token_to_id(name) is None:
            raise CheckpointError(
                f"{file} names {key} {name!r}, which is not in the vocabulary of the tokenizer; take all tokenizer "
                "files from the same checkpoint"
            )
        return name
    return None


def _mask_by_id(directory: Path, backend: tokenizers.Tokenizer) -> str | None:
    file = directory / "config.json"
    mask_id = read_json_object(file).get("mask_token_id") if file.exists() else None
    return backend.id_to_token(mask_id) if isinstance(mask_id, int) and mask_id >= 0 else None


def read_backend(
    path: str | Path, from_vocabulary: Callable[[Path], tokenizers.Tokenizer] | None = None
) -> tokenizers.Tokenizer:
    """Read the tokenizer of a checkpoint.

    Args:
        path: the checkpoint directory.
        from_vocabulary: builds the tokenizer from a directory with vocab.json and merges.txt, for families that publish
            these instead of tokenizer.json.

    Returns:
        The tokenizer, with every added token under the id that the files give it.

    Raises:
        CheckpointError: if the directory or its tokenizer files are missing, broken or contradict each other.
    """
    directory = Path(path)
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise CheckpointError(f"tokenizer directory {directory} {what}")
    if (file := directory / TOKENIZER_NAME).exists():
        content = read_json_object(file)
        check_tokenizer_json(content, file)
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        check_ids(backend, {token["content"]: token["id"] for token in content.get("added_tokens", [])}, file)
    elif from_vocabulary and (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        backend = from_vocabulary(directory)
    else:
        needed = (
            f"neither {TOKENIZER_NAME} nor vocab.json with merges.txt" if from_vocabulary else f"no {TOKENIZER_NAME}"
        )
        raise CheckpointError(f"{directory} has {needed}; download the tokenizer files of the checkpoint too")
    _add_tokens(backend, directory)
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, directory: Path) -> None:
    """Add the tokens that only tokenizer_config.json or, in old checkpoints, added_tokens.json lists."""
    file = directory / CONFIG_NAME
    entries = read_json_object(file).get("added_tokens_decoder") if file.exists() else None
    if entries is None and (directory / ADDED_TOKENS_NAME).exists():
        file = directory / ADDED_TOKENS_NAME
        entries = {str(token_id): {"content": name} for name, token_id in read_json_object(file).items()}
    if entries is None:
        return
    if not isinstance(entries, dict) or not all(_is_added_token(key, entry) for key, entry in entries.items()):
        raise CheckpointError(f"{file}: every added token needs an id >= 0 and its text as 'content'")
    # The library gives a new token the next free id, so they are added in the order of their ids.
    tokens = []
    for _, entry in sorted(entries.items(), key=lambda item: int(item[0])):
        flags = {flag: entry[flag] for flag in ADDED_TOKEN_FLAGS if flag in entry}
        tokens.append(AddedToken(entry["content"], **flags))
    backend.add_tokens([token for token in tokens if backend.token_to_id(token.content) is None])
    backend.add_special_tokens([token for token in tokens if token.special])
    check_ids(backend, {entry["content"]: int(token_id) for token_id, entry in entries.items()}, file)


def _is_added_token(token_id: str, entry: Any) -> bool:
    return (
        token_id.isdecimal()
        and isinstance(entry, dict)
        and isinstance(entry.get("content"), str)
        and all(isinstance(entry.get(flag, False), bool) for flag in ADDED_TOKEN_FLAGS)
    )


def check_ids(backend: tokenizers.Tokenizer, ids: Mapping[str, int], file: Path) -> None:
    """Hold the ids that a file gives to tokens against the tokenizer, which numbers added tokens by itself.

    Raises:
        CheckpointError: at the first token that has another id.
    """
    for name, token_id in ids.items():
        if (actual := backend.token_to_id(name)) != token_id:
            raise CheckpointError(
                f"{file} gives the token {name!r} the id {token_id}, but the tokenizer has it at {actual}; take all "
                "tokenizer files from the same checkpoint"
            )


def check_tokenizer_json(content: Mapping[str, Any], file: Path) -> None:
    """Hold a tokenizer.json against the form that the `tokenizers` library reads.

    The library ends a malformed one with a bare Exception or a panic, neither of which can be told from a defect of
    this program.

    Raises:
        CheckpointError: at the first part that is not of that form.
    """
    model = content.get("model")
    if not isinstance(model, dict) or not hasattr(tokenizers.models, str(model.get("type", "BPE"))):
        raise CheckpointError(
            f"{file}: 'model' is not a tokenizer model; the file must be one of the `tokenizers` library"
        )
    if model.get("type", "BPE") == "BPE":
        prefix = model.get("continuing_subword_prefix") or ""
        if not isinstance(prefix, str):
            raise CheckpointError(f"{file}: continuing_subword_prefix is {prefix!r}, not text")
        check_bpe(model.get("vocab"), model.get("merges"), file, prefix)
    for key, (module, inner) in _COMPONENTS.items():
        unknown = _unknown_part(content.get(key), module, inner)
        if content.get(key) is not None and unknown is not None:
            raise CheckpointError(f"{file}: {key} holds {unknown[:80]}, which is not a known {key}")
    added = content.get("added_tokens", [])
    flags = set(ADDED_TOKEN_FLAGS)
    if not isinstance(added, list) or not all(
        isinstance(token, dict)
        and flags <= token.keys()
        and _is_id(token.get("id"))
        and _is_added_token(str(token["id"]), token)
        for token in added
    ):
        raise CheckpointError(f"{file}: every entry of added_tokens needs id, content, {', '.join(ADDED_TOKEN_FLAGS)}")


def _unknown_part(part: Any, module: ModuleType, inner: str) -> str | None:
    """The first of a part and the parts that it joins that is not of a type of the module, as text."""
    if not isinstance(part, dict) or not hasattr(module, str(part.get("type"))):
        return repr(part)
    parts = part.get(inner) if part["type"] == "Sequence" else []
    if not isinstance(parts, list):
        return repr(part)
    return next((unknown for joined in parts if (unknown := _unknown_part(joined, module, inner))), None)


def check_bpe(vocab: Any, merges: Any, file: Path, prefix: str = "") -> None:
    """Hold the vocabulary and the merges of a byte-pair encoding against each other.

    Args:
        vocab: token ids by token.
        merges: pairs of tokens, each as "left right" or [left, right].
        file: where they come from, for the message.
        prefix: what a token that goes on a word starts with, and a merge drops.

    Raises:
        CheckpointError: if they are not of that form, or a merge needs a token that is not in the vocabulary.
    """
    if not isinstance(vocab, dict) or not all(_is_id(token_id) for token_id in vocab.values()):
        raise CheckpointError(f"{file}: the vocabulary is not an object of token ids by token")
    if not isinstance(merges, Sequence):
        raise CheckpointError(f"{file}: the merges are not a list")
    for number, merge in enumerate(merges, start=1):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise CheckpointError(f"{file}: merge {number} is {merge!r}, not two tokens")
        for token in (*pair, pair[0] + pair[1][len(prefix) :]):
            if token not in vocab:
                raise CheckpointError(
                    f"{file}: merge {number} ({pair[0]} {pair[1]}) needs {token!r}, which is not in the vocabulary"
                )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32
