"""The tokenizer files of a checkpoint: found, checked and read.

Only JSON and text files are read: no code of the checkpoint is run and nothing is unpickled. Special tokens are found
by name, because their ids differ between checkpoints of one family.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models.files._directory import read_json_object

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
SPECIAL_MAP_NAME = "special_tokens_map.json"
ADDED_TOKENS_NAME = "added_tokens.json"
BUILDER_KEY = "dllm_jepa.tokenizer"  # in tokenizer_config.json; the library of the hub passes over it
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def tokenizer_builder(directory: str | Path) -> str | None:
    """Path of the function that makes the tokenizer of a directory, where `Tokenizer.save` has noted it."""
    file = Path(directory) / CONFIG_NAME
    name = read_json_object(file).get(BUILDER_KEY) if file.exists() else None
    return name if isinstance(name, str) else None


def read_special_tokens(
    directory: Path, backend: tokenizers.Tokenizer, published_names: Mapping[str, str]
) -> dict[str, str]:
    """Find the names of the special tokens of a checkpoint, as arguments of `Tokenizer`.

    A name comes from tokenizer_config.json, else special_tokens_map.json, else (if it is in the vocabulary) from the
    published checkpoints of the family; the mask token at last from the `mask_token_id` of config.json.

    Raises:
        CheckpointError: if a named token is not in the vocabulary, no mask or eos token is found, or the mask token is
            also one of the others.
    """
    files = [directory / name for name in (CONFIG_NAME, SPECIAL_MAP_NAME) if (directory / name).exists()]
    sources = {file: read_json_object(file) for file in files}
    found = {}
    for key in ("mask_token", "eos_token", "pad_token", "bos_token"):
        name = _named_token(sources, key, backend) or published_names.get(key)
        if name is not None and backend.token_to_id(name) is not None:
            found[key] = name
    if "mask_token" not in found and (by_id := _mask_by_id(directory, backend)) is not None:
        found["mask_token"] = by_id
    if "mask_token" not in found:
        raise CheckpointError(
            f"tokenizer without a mask token: {directory / CONFIG_NAME} names no mask_token, "
            f"{published_names['mask_token']!r} is not in the vocabulary and {directory / 'config.json'} has no "
            "mask_token_id that is the id of a token. Use the tokenizer files of a masked diffusion checkpoint, or "
            f'name its token under "mask_token" in {CONFIG_NAME}'
        )
    if "eos_token" not in found:
        raise CheckpointError(
            f"tokenizer without an eos token: {directory / CONFIG_NAME} names no eos_token and "
            f'{published_names["eos_token"]!r} is not in the vocabulary; name it under "eos_token" in {CONFIG_NAME}'
        )
    mask = found["mask_token"]
    if same := [key for key in ("eos_token", "pad_token", "bos_token") if found.get(key) == mask]:
        other = same[0].replace("_", " ")
        raise CheckpointError(f"{directory}: {mask!r} is both the mask token and the {other}; they must differ")
    return found


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
    """Read the tokenizer of a checkpoint, with every added token under the id that tokenizer_config.json gives it.

    Args:
        path: the checkpoint directory.
        from_vocabulary: builds the tokenizer from a directory with vocab.json and merges.txt, for families that publish
            these instead of tokenizer.json.

    Raises:
        CheckpointError: if the directory or its tokenizer files are missing, broken or contradict each other.
    """
    directory = Path(path)
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise CheckpointError(f"tokenizer directory {directory} {what}")
    if (file := directory / TOKENIZER_NAME).exists():
        with judged_by_tokenizers(str(file)):
            backend = tokenizers.Tokenizer.from_file(str(file))
    elif from_vocabulary and (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        backend = from_vocabulary(directory)
    else:
        lacks = (
            f"neither {TOKENIZER_NAME} nor vocab.json with merges.txt" if from_vocabulary else f"no {TOKENIZER_NAME}"
        )
        raise CheckpointError(f"{directory} has {lacks}; download the tokenizer files of the checkpoint too")
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
    ids = sorted(entries, key=int)
    tokens = []
    for entry in map(entries.__getitem__, ids):
        flags = {flag: entry[flag] for flag in ADDED_TOKEN_FLAGS if flag in entry}
        tokens.append(AddedToken(entry["content"], **flags))
    backend.add_tokens([token for token in tokens if backend.token_to_id(token.content) is None])
    backend.add_special_tokens([token for token in tokens if token.special])
    for token_id, token in zip(ids, tokens, strict=True):
        if (actual := backend.token_to_id(token.content)) != int(token_id):
            raise CheckpointError(
                f"{file} gives the token {token.content!r} the id {token_id}, but the tokenizer has it at {actual}; "
                "take all tokenizer files from the same checkpoint"
            )


def _is_added_token(token_id: str, entry: Any) -> bool:
    return (
        token_id.isdecimal()
        and isinstance(entry, dict)
        and isinstance(entry.get("content"), str)
        and all(isinstance(entry.get(flag, False), bool) for flag in ADDED_TOKEN_FLAGS)
    )


@contextmanager
def judged_by_tokenizers(files: str) -> Iterator[None]:
    """Turn what the library raises over these files into a CheckpointError; around its call alone."""
    try:
        yield
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(f"{files}: not what the `tokenizers` library reads: {error}") from error
