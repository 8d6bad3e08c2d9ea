"""Texts and chats to token ids and back, against other encoders, written-out templates and invariants."""

import copy
import json
import pickle
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models import find_tokenizer, known_tokenizers, tokenizer_builder
from dllm_jepa.models._tokenizer import Tokenizer
from dllm_jepa.models.dream._tokenizer import DreamTokenizer, dream_tokenizer
from dllm_jepa.models.llada._tokenizer import LLaDATokenizer, llada_tokenizer
from dllm_jepa.models.tiny._tokenizer import TinyTokenizer, tiny_tokenizer
from dllm_jepa.models.tiny._vocabulary import SPECIAL_TOKENS
from tests.models.tokenizer_layouts import (
    CORPUS,
    CUTS,
    DREAM_ADDED,
    HEADERS,
    LLADA_ADDED,
    edit_json,
    library_reading,
    trained_backend,
    write_dream,
    write_llada,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SPECIAL = [name for name in LLADA_ADDED + DREAM_ADDED if name != "<tool_call>"] + [*SPECIAL_TOKENS]
# Without the text of special tokens, which the library would turn into their ids.
ORDINARY_TEXT = TEXT.filter(lambda text: not any(name in text for name in LLADA_ADDED + DREAM_ADDED))
# Letters that every Unicode version of the last years knows, so that two engines cut the same words.
OLD_TEXT = st.text(
    st.one_of(
        st.sampled_from("  \n\n\r\t'sStTdDmMlLrReEvV0123.,;(){}\u0301\u00e9\u4f60\u597d\u3000\u00a0\U0001f642"),
        st.characters(max_codepoint=0x3FF, exclude_categories=["Cs", "Cn", "Cc"]),
    ),
    max_size=40,
)
# A busy machine must not fail a test.
UNHURRIED = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
Conversation = list[dict[str, str]]


def conversations(text: st.SearchStrategy[str]) -> st.SearchStrategy[Conversation]:
    message = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": text})
    return st.lists(message, min_size=1, max_size=5)


@pytest.fixture(scope="module")
def llada_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llada(tmp_path_factory.mktemp("llada"))


@pytest.fixture(scope="module")
def dream_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dream(tmp_path_factory.mktemp("dream"))


@pytest.fixture(scope="module")
def llada(llada_dir: Path) -> LLaDATokenizer:
    return llada_tokenizer(str(llada_dir))


@pytest.fixture(scope="module")
def dream(dream_dir: Path) -> DreamTokenizer:
    return dream_tokenizer(str(dream_dir))


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module", params=["llada", "dream", "tiny"])
def family(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


@pytest.fixture(scope="module")
def saved(family: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "made" / "here"
    family.save(directory)
    return directory


@pytest.fixture(scope="module")
def reading(saved: Path) -> tokenizers.Tokenizer:
    return library_reading(saved)


def stripped(family: Tokenizer, text: str) -> str:
    return text.strip() if isinstance(family, LLaDATokenizer) else text


def template(family: Tokenizer, messages: Conversation, add_generation_prompt: bool) -> str:
    """The published template, written out."""
    before, header, end = {
        LLaDATokenizer: ("<|startoftext|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
        DreamTokenizer: ("", "<|im_start|>{}\n", "<|im_end|>\n"),
        TinyTokenizer: ("<|startoftext|>", "<|{}|>", "<|end|>"),
    }[type(family)]
    if isinstance(family, DreamTokenizer) and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    turns = [header.format(turn["role"]) + stripped(family, turn["content"]) + end for turn in messages]
    return before + "".join(turns) + header.format("assistant") * add_generation_prompt


@UNHURRIED
@given(messages=conversations(ORDINARY_TEXT), add_generation_prompt=st.booleans())
def test_a_chat_is_the_written_out_template(
    family: Tokenizer, reading: tokenizers.Tokenizer, messages: Conversation, add_generation_prompt: bool
) -> None:
    if isinstance(family, DreamTokenizer):
        # White space in front may hold a line break that the template's own would merge with.
        messages = [message | {"content": message["content"].lstrip()} for message in messages]
    ids, response = family.encode_chat(messages, add_generation_prompt=add_generation_prompt)
    assert ids == reading.encode(template(family, messages, add_generation_prompt)).ids
    assert len(response) == len(ids)


@UNHURRIED
@given(messages=conversations(TEXT))
def test_prompt_is_a_prefix_of_the_conversation_with_the_answer(family: Tokenizer, messages: Conversation) -> None:
    messages = [{"role": "user", "content": "Hi"}, *messages]
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, _ = family.encode_chat(messages[:k], add_generation_prompt=True)
            longer, response = family.encode_chat(messages[: k + 1])
            assert longer[: len(prompt)] == prompt
            # What follows the prompt starts with the response, and the next turn only appends.
            assert response[len(prompt)]
            assert family.encode_chat(messages)[0][: len(longer)] == longer


@UNHURRIED
@given(messages=conversations(TEXT))
def test_response_is_the_assistant_content_and_its_end_of_turn(family: Tokenizer, messages: Conversation) -> None:
    ids, response = family.encode_chat(messages, add_generation_prompt=True)
    kept = [token_id for token_id, is_response in zip(ids, response, strict=True) if is_response]
    (end_id,) = family.end_ids - {family.eos_id}
    answers = [stripped(family, turn["content"]) for turn in messages if turn["role"] == "assistant"]
    assert kept == [token_id for answer in answers for token_id in (*family.encode(answer), end_id)]


@UNHURRIED
@given(before=TEXT, after=TEXT)
def test_special_text_in_content_stays_text(family: Tokenizer, before: str, after: str) -> None:
    special = "".join(SPECIAL) + "\n"  # with which nothing is composed
    plain = family.encode(before + special + after)
    assert not {family._backend.token_to_id(name) for name in SPECIAL} & set(plain)
    assert special in family.decode(plain)
    (content, _), (turns, _) = (family.encode_chat([{"role": "user", "content": text}]) for text in (special, "plain"))
    (end_id,) = family.end_ids - {family.eos_id}
    assert family.mask_id not in content and content.count(end_id) == turns.count(end_id)


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_special_text_is_encoded_like_any_other_text(name: str, request: pytest.FixtureRequest) -> None:
    family: Tokenizer = request.getfixturevalue(name)
    for copied in (family, copy.deepcopy(family), pickle.loads(pickle.dumps(family))):
        for text in ("a<|endoftext|>b <|mdm_mask|><|mask|>", " <|im_start|>\n<|eot_id|>"):
            assert copied.encode(text) == trained_backend().encode(text).ids


def test_refused_conversations(family: Tokenizer) -> None:
    roles = "allowed are system, user, assistant"
    refused: list[tuple[Any, str]] = [
        ([{"role": "human", "content": "Hi"}], f"message 0 has role 'human'; {roles}"),
        ([{"role": "user", "content": "Hi"}, {"content": "Hi"}], f"message 1 has role None; {roles}"),
        ([{"role": "user", "content": 3}], "message 0 has no text under 'content'"),
        ([], "messages is empty"),
    ]
    for messages, message in refused:
        with pytest.raises(ValueError, match=message):
            family.encode_chat(messages)


def test_a_chat_needs_its_tokens(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "Hi"}]
    base = llada_tokenizer(write_llada(tmp_path / "base", [name for name in LLADA_ADDED if name not in HEADERS]))
    with pytest.raises(CheckpointError, match=r"no chat tokens <\|start_header_id\|>, .*`template: plain`"):
        base.encode_chat(message)
    assert base.decode(base.encode("plain text works")) == "plain text works"
    dream = dream_tokenizer(
        write_dream(tmp_path / "dream", ["<|endoftext|>", "<|beginoftext|>", "<|im_start|>", "<|mask|>"])
    )
    with pytest.raises(
        CheckpointError, match=r"base model: it has no chat tokens <\|im_end\|>\. Use `template: plain`"
    ):
        dream.encode_chat(message)
    directory = write_llada(tmp_path / "no_bos", LLADA_ADDED[1:])
    edit_json(directory / "tokenizer_config.json", bos_token=None)
    with pytest.raises(CheckpointError, match="no bos_token"):
        llada_tokenizer(directory).encode_chat(message)


# --- text ---


@UNHURRIED
@given(text=TEXT)
@example(text="e\u0301")
def test_any_text_survives(family: Tokenizer, text: str) -> None:
    """Dream normalises."""
    expected = unicodedata.normalize("NFC", text) if isinstance(family, DreamTokenizer) else text
    assert family.decode(family.encode(text), skip_special_tokens=False) == expected
    assert family.decode(family.encode(text)) == expected


def test_special_tokens_are_skipped_or_shown(family: Tokenizer) -> None:
    ids = [*family.encode("a"), family.mask_id, *family.encode("b"), family.eos_id, family.vocab_size + 7]
    assert family.decode(ids) == "ab"
    mask = family.decode([family.mask_id], skip_special_tokens=False)
    assert family.decode(ids, skip_special_tokens=False) == f"a{mask}b<|endoftext|>"


@pytest.fixture(scope="module")
def byte_ranks(dream_dir: Path) -> tiktoken.Encoding:
    """Another implementation of byte-level BPE, fed the same vocabulary as bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    vocab = json.loads((dream_dir / "vocab.json").read_text(encoding="utf-8"))
    ranks = {bytes(byte_of[char] for char in token): token_id for token, token_id in vocab.items()}
    return tiktoken.Encoding("reference", pat_str=CUTS, mergeable_ranks=ranks, special_tokens={})


@UNHURRIED
@given(text=OLD_TEXT)
@example(text="It's  I'LL don't\r\n\n 123 caf\u00e9!!\n\n x")
def test_dream_encodes_as_another_implementation(
    dream: DreamTokenizer, byte_ranks: tiktoken.Encoding, text: str
) -> None:
    assert dream.encode(text) == byte_ranks.encode(unicodedata.normalize("NFC", text))


def test_only_functions_of_the_tables_are_found_by_their_path() -> None:
    for path in known_tokenizers():
        assert find_tokenizer(path) is not None
        for other in (f"{path}.__globals__", path.rpartition(".")[0], f"{path} ", "os.getcwd", ""):
            assert find_tokenizer(other) is None, other


def test_save_keeps_ids_and_names(family: Tokenizer, saved: Path, tmp_path: Path) -> None:
    assert {file.name for file in saved.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    path = tokenizer_builder(saved)
    assert path == family.builder and path in known_tokenizers()
    build = find_tokenizer(path)
    assert build is not None
    read = build(saved)
    for key in ("mask_id", "eos_id", "pad_id", "bos_id", "end_ids", "vocab_size", "token_ids"):
        assert getattr(read, key) == getattr(family, key)
    text = "".join(CORPUS) + "".join(SPECIAL)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    assert read.encode(text) == family.encode(text)
    assert read.encode_chat(messages) == family.encode_chat(messages)
    every = list(range(family.vocab_size))
    for skip in (True, False):
        assert read.decode(every, skip_special_tokens=skip) == family.decode(every, skip_special_tokens=skip)
    read.save(tmp_path)
    for file in saved.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_lengths_in_tokenizer_json_do_not_cut_or_pad(tmp_path: Path) -> None:
    directory = write_llada(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    (directory / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    tokenizer = llada_tokenizer(str(directory))
    assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == CORPUS[0]
    assert len(tokenizer.encode("a")) == 1


def test_special_text_is_cut_where_the_model_knows_whole_words() -> None:
    vocab = {"<unk>": 0, "a": 1, "<mask>": 2, "<eos>": 3, "<": 4, "mask>": 5, "b": 9}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(backend, mask_token="<mask>", eos_token="<eos>")
    assert tokenizer.encode("a <mask> <mask> b") == [1, 4, 5, 4, 5, 9]
    assert tokenizer.encode("a <unk> nothing") == [1, 0, 0]
    # Ids 6 to 8 have no token.
    assert tokenizer.token_ids == [0, 1, 2, 3, 4, 5, 9]
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id) == (10, 3, None)
    with pytest.raises(CheckpointError, match="template: plain"):
        tokenizer.encode_chat([{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match="mask_token '<x>', bos_token '<y>'"):
        Tokenizer(backend, mask_token="<x>", eos_token="<eos>", bos_token="<y>")


def test_a_mask_token_that_is_not_marked_special_becomes_so(tmp_path: Path) -> None:
    directory = write_llada(tmp_path, [name for name in LLADA_ADDED if name != "<|mdm_mask|>"])
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_tokens([AddedToken("<|mdm_mask|>", normalized=False)])
    (directory / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    tokenizer = llada_tokenizer(str(directory))
    assert tokenizer.mask_id not in tokenizer.encode("a <|mdm_mask|>")
    assert tokenizer.decode([tokenizer.mask_id]) == ""
