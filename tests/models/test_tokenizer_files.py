"""Special tokens by name, both layouts of the files, and every way in which they can be broken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models._tokenizer import Tokenizer
from dllm_jepa.models.dream._tokenizer import DreamTokenizer, dream_tokenizer
from dllm_jepa.models.llada._tokenizer import LLaDATokenizer, llada_tokenizer
from tests.models.tokenizer_layouts import (
    CORPUS,
    DREAM_ADDED,
    LLADA_ADDED,
    edit_json,
    library_reading,
    trained_backend,
    write_dream,
    write_json,
    write_llada,
)


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> LLaDATokenizer:
    return llada_tokenizer(str(write_llada(tmp_path_factory.mktemp("llada"))))


@pytest.fixture(scope="module")
def dream(tmp_path_factory: pytest.TempPathFactory) -> DreamTokenizer:
    return dream_tokenizer(str(write_dream(tmp_path_factory.mktemp("dream"))))


# --- special tokens, found by name ---


@pytest.mark.parametrize(
    ("write", "build", "names", "bos"),
    [
        (write_llada, llada_tokenizer, LLADA_ADDED[::-1], "<|startoftext|>"),
        (write_dream, dream_tokenizer, DREAM_ADDED[::-1], "<|beginoftext|>"),
    ],
)
def test_ids_follow_the_names(tmp_path: Path, write: Any, build: Any, names: list[str], bos: str) -> None:
    tokenizer = build(write(tmp_path, names))
    first = trained_backend().get_vocab_size()
    assert tokenizer.mask_id == first + names.index("<|mdm_mask|>" if build is llada_tokenizer else "<|mask|>")
    assert tokenizer.eos_id == tokenizer.pad_id == first + names.index("<|endoftext|>")
    assert tokenizer.bos_id == first + names.index(bos)
    assert tokenizer.token_ids == list(range(first + len(names)))


def test_named_mask_token_goes_before_the_family_default(tmp_path: Path) -> None:
    for value in ("[CLS]", {"content": "[CLS]", "lstrip": False}):
        edit_json(write_llada(tmp_path) / "tokenizer_config.json", mask_token=value)
        tokenizer = llada_tokenizer(str(tmp_path))
        assert tokenizer.decode([tokenizer.mask_id], skip_special_tokens=False) == "[CLS]"


def test_special_tokens_map_fills_what_the_config_lacks(tmp_path: Path) -> None:
    directory = write_llada(tmp_path)
    edit_json(directory / "tokenizer_config.json", pad_token=None)
    mapped = {"pad_token": {"content": "[CLS]"}, "eos_token": "<|reserved_token_0|>"}
    write_json(directory / "special_tokens_map.json", mapped)
    tokenizer = llada_tokenizer(str(directory))
    assert tokenizer.decode([tokenizer.pad_id], skip_special_tokens=False) == "[CLS]"
    assert tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False) == "<|endoftext|>"


def test_mask_token_by_the_id_in_config_json(tmp_path: Path) -> None:
    directory = write_llada(tmp_path / "source", [name for name in LLADA_ADDED if name != "<|mdm_mask|>"])
    for config in (None, {}, {"mask_token_id": 100_000}, {"mask_token_id": -1}):
        if config is not None:
            write_json(directory / "config.json", config)
        words = ("tokenizer_config.json", "<|mdm_mask|>", "mask_token_id", "Use the tokenizer files")
        refuse(llada_tokenizer, directory, "tokenizer without a mask token", *words)
    write_json(directory / "config.json", {"mask_token_id": 5})
    tokenizer = llada_tokenizer(str(directory))
    tokenizer.save(tmp_path / "saved")  # where there is no such config.json
    assert tokenizer.mask_id == llada_tokenizer(str(tmp_path / "saved")).mask_id == 5


def test_without_a_config_the_family_names_hold(tmp_path: Path) -> None:
    directory = write_llada(tmp_path)
    (directory / "tokenizer_config.json").unlink()
    tokenizer = llada_tokenizer(str(directory))
    marked = library_reading(directory)
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.bos_id) == tuple(
        marked.token_to_id(name) for name in ("<|mdm_mask|>", "<|endoftext|>", "<|startoftext|>")
    )


# --- layouts and broken files ---


def test_tokenizer_json_goes_before_vocab_json(tmp_path: Path, dream: DreamTokenizer) -> None:
    dream.save(tmp_path)
    (tmp_path / "vocab.json").write_text("not read", encoding="utf-8")
    (tmp_path / "merges.txt").write_text("not read", encoding="utf-8")
    assert dream_tokenizer(str(tmp_path)).encode(CORPUS[0]) == dream.encode(CORPUS[0])


def test_added_tokens_json_serves_old_checkpoints(tmp_path: Path, dream: DreamTokenizer) -> None:
    directory = write_dream(tmp_path)
    entries = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
    ids = {entry["content"]: int(token_id) for token_id, entry in entries.items()}
    write_json(directory / "added_tokens.json", dict(reversed(ids.items())))
    edit_json(directory / "tokenizer_config.json", added_tokens_decoder=None)
    tokenizer = dream_tokenizer(str(directory))
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.bos_id) == (dream.mask_id, dream.eos_id, dream.bos_id)
    # That file does not say which tokens are special: only the named ones and those of the chat format are.
    named = [name for name in DREAM_ADDED if name != "<|vision_start|>"]
    messages = [{"role": "user", "content": CORPUS[0] + "".join(named)}]
    assert tokenizer.encode_chat(messages) == dream.encode_chat(messages)


def test_the_config_lists_added_tokens_and_says_which_are_special(tmp_path: Path, llada: LLaDATokenizer) -> None:
    file = write_llada(tmp_path) / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] = [token | {"special": False} for token in content["added_tokens"][:4]]
    write_json(file, content)
    tokenizer = llada_tokenizer(str(tmp_path))
    assert tokenizer.mask_id == llada.mask_id
    for name in ("<role>", LLADA_ADDED[3]):
        assert tokenizer.encode(name) == trained_backend().encode(name).ids


def refuse(build: Callable[[str], Tokenizer], directory: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        build(str(directory))
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    refuse(llada_tokenizer, tmp_path / "nowhere", "nowhere", "does not exist")
    (tmp_path / "file").touch()
    refuse(llada_tokenizer, tmp_path / "file", "is not a directory")
    (tmp_path / "empty").mkdir()
    refuse(llada_tokenizer, tmp_path / "empty", "no tokenizer.json")
    refuse(dream_tokenizer, tmp_path / "empty", "neither tokenizer.json nor vocab.json with merges.txt")
    (write_dream(tmp_path / "dream") / "merges.txt").unlink()
    refuse(dream_tokenizer, tmp_path / "dream", "neither tokenizer.json nor vocab.json with merges.txt")


def test_broken_json(tmp_path: Path) -> None:
    file = write_llada(tmp_path) / "special_tokens_map.json"
    file.write_text('{\n  "a": 1,\n  "b": ', encoding="utf-8")
    refuse(llada_tokenizer, tmp_path, f"{file} is not JSON", "line 3, column 8")
    file.write_bytes(b'{"\xff": 1}')
    refuse(llada_tokenizer, tmp_path, f"{file} is not JSON", "byte 2")
    file.write_text("[1]", encoding="utf-8")
    refuse(llada_tokenizer, tmp_path, str(file), "one JSON object")


def test_special_tokens_that_cannot_be_used(tmp_path: Path) -> None:
    directory = write_llada(tmp_path)
    edit_json(directory / "tokenizer_config.json", pad_token="<|gone|>")
    refuse(llada_tokenizer, directory, "tokenizer_config.json", "pad_token", "'<|gone|>'", "not in the vocabulary")
    edit_json(directory / "tokenizer_config.json", eos_token=3)
    refuse(llada_tokenizer, directory, "eos_token is 3")
    edit_json(directory / "tokenizer_config.json", eos_token="<|mdm_mask|>", pad_token=None)
    refuse(llada_tokenizer, directory, "'<|mdm_mask|>' is both the mask token and the eos token")
    directory = write_llada(tmp_path / "no_eos", [name for name in LLADA_ADDED if name != "<|endoftext|>"])
    edit_json(directory / "tokenizer_config.json", eos_token=None, pad_token=None)
    refuse(llada_tokenizer, directory, "without an eos token", "'<|endoftext|>'")


def test_files_that_the_library_refuses(tmp_path: Path) -> None:
    """Its reason goes into the one message, with the file."""
    file = write_llada(tmp_path / "llada") / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["merges"][0] = ["zzz", "a"]
    write_json(file, content)
    refuse(llada_tokenizer, file.parent, f"{file}: not what the `tokenizers` library reads", "`zzz` out of vocabulary")
    file.write_text("{", encoding="utf-8")
    refuse(llada_tokenizer, file.parent, f"{file}: not what", "EOF while parsing")
    merges = write_dream(tmp_path / "dream") / "merges.txt"
    merges.write_text("#version: 0.2\nthe\n", encoding="utf-8")
    refuse(dream_tokenizer, merges.parent, f"vocab.json and {merges}: not what", "invalid at line 1")


def test_malformed_added_tokens(tmp_path: Path) -> None:
    file = write_llada(tmp_path) / "tokenizer_config.json"
    for entries in (
        [],
        {"a": {"content": "x"}},
        {"1": "x"},
        {"1": {"content": 1}},
        {"1": {"content": "x", "lstrip": 1}},
    ):
        edit_json(file, added_tokens_decoder=entries)
        refuse(llada_tokenizer, tmp_path, "tokenizer_config.json", "added token")


def test_added_token_under_an_id_of_its_own(tmp_path: Path) -> None:
    directory = write_dream(tmp_path)
    edit_json(directory / "tokenizer_config.json", added_tokens_decoder={"9999": {"content": "<|mask|>"}})
    refuse(dream_tokenizer, directory, "tokenizer_config.json", "'<|mask|>' the id 9999")
