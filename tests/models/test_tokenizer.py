"""Texts and chats to token ids and back, against other encoders, written-out templates and invariants."""

import copy
import json
import pickle
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models import FAMILIES, find_tokenizer, known_tokenizers
from dllm_jepa.models._tokenizer import Tokenizer
from dllm_jepa.models.dream._tokenizer import DreamTokenizer, dream_tokenizer
from dllm_jepa.models.llada._tokenizer import LLaDATokenizer, llada_tokenizer
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
    write_json,
    write_llada,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
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
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


@pytest.fixture(scope="module", params=["llada", "dream"])
def family(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


def llada_template(messages: Conversation, add_generation_prompt: bool) -> str:
    turns = [(message["role"], message["content"].strip() + "<|eot_id|>") for message in messages]
    if add_generation_prompt:
        turns.append(("assistant", ""))
    written = (f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}" for role, content in turns)
    return "<|startoftext|>" + "".join(written)


def dream_template(messages: Conversation, add_generation_prompt: bool) -> str:
    default = [] if messages[0]["role"] == "system" else [("system", "You are a helpful assistant.")]
    turns = default + [(message["role"], message["content"]) for message in messages]
    written = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return written + ("<|im_start|>assistant\n" if add_generation_prompt else "")


@UNHURRIED
@given(messages=conversations(ORDINARY_TEXT), add_generation_prompt=st.booleans())
def test_llada_chat_is_the_written_out_template(
    llada: LLaDATokenizer, llada_dir: Path, messages: Conversation, add_generation_prompt: bool
) -> None:
    expected = library_reading(llada_dir).encode(llada_template(messages, add_generation_prompt)).ids
    ids, response = llada.encode_chat(messages, add_generation_prompt=add_generation_prompt)
    assert ids == expected
    assert len(response) == len(ids)


@UNHURRIED
@given(messages=conversations(ORDINARY_TEXT), add_generation_prompt=st.booleans())
def test_dream_chat_is_the_written_out_template(
    dream: DreamTokenizer, saved_dream: Path, messages: Conversation, add_generation_prompt: bool
) -> None:
    # White space in front may hold a line break that the template's own would merge with.
    messages = [message | {"content": message["content"].lstrip()} for message in messages]
    expected = library_reading(saved_dream).encode(dream_template(messages, add_generation_prompt)).ids
    ids, response = dream.encode_chat(messages, add_generation_prompt=add_generation_prompt)
    assert ids == expected
    assert len(response) == len(ids)


@pytest.fixture(scope="module")
def saved_dream(dream: DreamTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved_dream")
    dream.save(directory)
    return directory


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
    is_llada = isinstance(family, LLaDATokenizer)
    end_id = family._backend.token_to_id("<|eot_id|>" if is_llada else "<|im_end|>")
    expected = []
    for message in messages:
        if message["role"] == "assistant":
            content = message["content"].strip() if is_llada else message["content"]
            expected += [*family.encode(content), end_id]
    assert kept == expected


@UNHURRIED
@given(before=TEXT, after=TEXT)
def test_special_text_in_content_stays_text(family: Tokenizer, before: str, after: str) -> None:
    special = [name for name in LLADA_ADDED + DREAM_ADDED if name != "<tool_call>"]
    content = before + "".join(special) + after
    plain = family.encode(content)
    assert not {family._backend.token_to_id(name) for name in special} & set(plain)
    ids, _ = family.encode_chat([{"role": "user", "content": content}])
    assert family.mask_id not in ids
    turns, _ = family.encode_chat([{"role": "user", "content": "plain"}])
    end = family._backend.token_to_id("<|eot_id|>" if isinstance(family, LLaDATokenizer) else "<|im_end|>")
    assert ids.count(end) == turns.count(end)
    assert "".join(special) in family.decode(plain)


def test_special_text_is_encoded_like_any_other_text(family: Tokenizer) -> None:
    for copied in (family, copy.deepcopy(family), pickle.loads(pickle.dumps(family))):
        for text in ("a<|endoftext|>b <|mdm_mask|><|mask|>", " <|im_start|>\n<|eot_id|>"):
            assert copied.encode(text) == trained_backend().encode(text).ids


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "human", "content": "Hi"}], ["message 0", "'human'", "system, user, assistant"]),
        ([{"role": "user", "content": "Hi"}, {"content": "Hi"}], ["message 1", "None", "system, user, assistant"]),
        ([{"role": "user"}], ["message 0", "'content'"]),
        ([{"role": "user", "content": 3}], ["message 0", "'content'"]),
        ([], ["empty"]),
    ],
)
def test_refused_conversations(family: Tokenizer, messages: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        family.encode_chat(messages)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("write", "build", "names"),
    [
        (write_llada, llada_tokenizer, [name for name in LLADA_ADDED if name not in HEADERS]),
        (write_dream, dream_tokenizer, ["<|endoftext|>", "<|mask|>", "<|beginoftext|>"]),
    ],
)
def test_base_tokenizer_has_no_chat(
    tmp_path: Path, write: Callable[..., Path], build: Callable[[str], Tokenizer], names: list[str]
) -> None:
    tokenizer = build(str(write(tmp_path, names)))
    with pytest.raises(CheckpointError, match="base model.*`template: plain`"):
        tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(tokenizer.encode("plain text works")) == "plain text works"


def test_llada_chat_needs_a_bos_token(tmp_path: Path) -> None:
    directory = write_llada(tmp_path, LLADA_ADDED[1:])
    edit_json(directory / "tokenizer_config.json", bos_token=None)
    with pytest.raises(CheckpointError, match="no bos_token"):
        llada_tokenizer(str(directory)).encode_chat([{"role": "user", "content": "Hi"}])


# --- text ---


@UNHURRIED
@given(text=TEXT)
def test_llada_round_trip(llada: LLaDATokenizer, text: str) -> None:
    assert llada.decode(llada.encode(text)) == text


@UNHURRIED
@given(text=TEXT)
@example(text="e\u0301")
def test_dream_round_trip_normalises(dream: DreamTokenizer, text: str) -> None:
    assert dream.decode(dream.encode(text), skip_special_tokens=False) == unicodedata.normalize("NFC", text)


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


@UNHURRIED
@given(text=TEXT)
def test_saved_tokenizer_is_equal(dream: DreamTokenizer, saved_dream: Path, text: str) -> None:
    saved = dream_tokenizer(str(saved_dream))
    assert saved.encode(text) == dream.encode(text)


def test_only_functions_of_the_tables_are_found_by_their_path(llada_dir: Path, dream_dir: Path) -> None:
    for family, directory in (("llada", llada_dir), ("Dream", dream_dir)):
        path = FAMILIES[family].tokenizer
        build = find_tokenizer(path)
        assert build is not None and build(directory).builder == path  # what `save` notes is found again
    for path in known_tokenizers():
        assert find_tokenizer(path) is not None
        for other in (f"{path}.__globals__", path.rpartition(".")[0], f"{path} ", "os.getcwd", ""):
            assert find_tokenizer(other) is None, other


@pytest.mark.parametrize(("name", "build"), [("llada", llada_tokenizer), ("dream", dream_tokenizer)])
def test_save_keeps_ids_and_names(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, build: Callable[[str], Tokenizer]
) -> None:
    original = request.getfixturevalue(name)
    original.save(tmp_path / "made" / "here")
    assert sorted(file.name for file in (tmp_path / "made" / "here").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    saved = build(str(tmp_path / "made" / "here"))
    for key in ("mask_id", "eos_id", "pad_id", "bos_id", "vocab_size", "token_ids"):
        assert getattr(saved, key) == getattr(original, key)
    text = "".join(CORPUS) + "".join(LLADA_ADDED + DREAM_ADDED)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    assert saved.encode(text) == original.encode(text)
    assert saved.encode_chat(messages) == original.encode_chat(messages)
    every = list(range(original.vocab_size))
    for skip in (True, False):
        assert saved.decode(every, skip_special_tokens=skip) == original.decode(every, skip_special_tokens=skip)


def test_save_keeps_a_mask_token_that_only_config_json_gave(tmp_path: Path) -> None:
    directory = write_llada(tmp_path / "source", [name for name in LLADA_ADDED if name != "<|mdm_mask|>"])
    write_json(directory / "config.json", {"mask_token_id": 5})
    llada_tokenizer(str(directory)).save(tmp_path / "saved")
    assert llada_tokenizer(str(tmp_path / "saved")).mask_id == 5


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
