"""Our models in lm-evaluation-harness: whole evaluations of local tasks, against what is computed directly."""

import functools
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_jepa.errors import CheckpointError, ConfigError
from dllm_jepa.evals.likelihood import conditional_log_likelihood
from dllm_jepa.generation import llada_decoding
from dllm_jepa.models import MaskedDiffusionLM, Tokenizer, save_hf
from dllm_jepa.models.dream import dream
from dllm_jepa.models.llada import llada
from dllm_jepa.models.tiny import tiny_tokenizer

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from dllm_jepa import lm_eval_adapter  # noqa: E402
from dllm_jepa.lm_eval_adapter import DLLMJEPAHarnessModel  # noqa: E402

SIZES = {"vocab_size": 512, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "mlp_dim": 48}
ROWS = [
    {"q": "lines with the word dog", "choices": ["dog", "[A-Z]", ".*dog.*[0-9]{3}moon.*"], "gold": 0},
    {"q": "lines with a capital letter", "choices": ["[0-9]", "[A-Z].*truck.*lake.*bird"], "gold": 1},
]
SETTINGS = {"until": ["stone", "glass"], "max_gen_toks": 12, "do_sample": False}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module", params=["llada"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    path = tmp_path_factory.mktemp("model") / "hf"
    torch.manual_seed(0)
    model = {"llada": llada, "dream": dream}[request.param](**SIZES, max_seq_len=96)
    with torch.no_grad():
        model.head.weight.mul_(20)  # answers that differ
    save_hf(model, path, tokenizer=tokenizer)
    return path


@pytest.fixture(scope="module")
def harness_model(checkpoint: Path) -> DLLMJEPAHarnessModel:
    return DLLMJEPAHarnessModel(str(checkpoint), device="cpu", batch_size=2, num_samples=5)


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """Three tasks on local rows."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
    }
    texts = {"doc_to_text": "{{q}}", "doc_to_target": "{{gold}}"}
    tasks = [
        {"task": "local_choice", "output_type": "multiple_choice", **texts, "doc_to_choice": "{{choices}}"},
        {
            "task": "local_generation",
            "output_type": "generate_until",
            **texts,
            "generation_kwargs": SETTINGS,
            "metric_list": [{"metric": "exact_match"}],
        },
        {"task": "local_rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}"},
    ]
    for task in tasks:
        # JSON is YAML.
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(shared | task))
    return tmp_path


def instance(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0)


def direct_bound(
    model: MaskedDiffusionLM, tokenizer: Tokenizer, prompt: list[int], response: list[int], num_samples: int = 5
) -> float:
    bounds = conditional_log_likelihood(model, [prompt], [response], mask_id=tokenizer.mask_id, num_samples=num_samples)
    return float(bounds[0])


def direct_generation(model: MaskedDiffusionLM, tokenizer: Tokenizer, prompt: list[int]) -> str:
    decoding = llada_decoding(gen_length=12, block_length=4, steps=6)
    generation = decoding.generate(
        model,
        [prompt],
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        token_ids=tokenizer.token_ids,
        stop_ids=sorted(tokenizer.end_ids),
    )
    text = tokenizer.decode(generation.canvas[0, : generation.num_tokens[0]].tolist())
    for stop in SETTINGS["until"]:
        text = text.partition(stop)[0]
    return text


@pytest.mark.parametrize("chat", [False, True])
def test_an_evaluation_equals_direct_computation(
    checkpoint: Path, tokenizer: Tokenizer, harness_model: DLLMJEPAHarnessModel, task_folder: Path, chat: bool
) -> None:
    model = harness_model._model
    found = simple_evaluate(
        model="dllm_jepa",
        model_args=f"checkpoint_dir={checkpoint},num_samples=5,block_length=4,steps=6",
        tasks=["local_choice", "local_generation", *(["local_rolling"] if not chat else [])],
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
        apply_chat_template=chat,
    )
    correct = 0
    for row, choice, generated in zip(
        ROWS, found["samples"]["local_choice"], found["samples"]["local_generation"], strict=True
    ):
        message = [{"role": "user", "content": row["q"]}]
        prompt = [tokenizer.bos_id, *tokenizer.encode(row["q"])]
        if chat:
            prompt, _ = tokenizer.encode_chat(message, add_generation_prompt=True)
        delimiter = "" if chat else " "
        responses = [tokenizer.encode(delimiter + text) for text in row["choices"]]
        bounds = [direct_bound(model, tokenizer, prompt, response) for response in responses]
        assert [resp[0][0] for resp in choice["resps"]] == pytest.approx(bounds, rel=1e-5)
        correct += bounds.index(max(bounds)) == row["gold"]
        assert generated["resps"] == [[direct_generation(model, tokenizer, prompt)]]
    assert found["results"]["local_choice"]["acc,none"] == correct / 2
    if not chat:
        rolled = [direct_bound(model, tokenizer, [tokenizer.bos_id], tokenizer.encode(row["q"])) for row in ROWS]
        values = [sample["resps"][0][0] for sample in found["samples"]["local_rolling"]]
        assert values == pytest.approx(rolled, rel=1e-5)


def test_the_command_line(
    checkpoint: Path, task_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Reading the thousands of tasks of the harness takes longer than everything else together.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))

    def run(*words: str) -> None:
        arguments = ["--include_path", str(task_folder), "--tasks", "local_choice", "--model", "dllm_jepa", *words]
        monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
        lm_eval_adapter.main()

    run(
        "--model_args", f"checkpoint_dir={checkpoint},device=cpu,num_samples=2", "--output_path", str(task_folder / "o")
    )
    (results,) = (task_folder / "o").rglob("results_*.json")
    assert "acc,none" in json.loads(results.read_text())["results"]["local_choice"]
    with pytest.raises(SystemExit) as stopped:
        run("--model_args", f"checkpoint_dir={task_folder / 'none'}", "--device", "cpu")
    assert stopped.value.code == 1
    assert f"error: checkpoint directory {task_folder / 'none'} does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--model_args", "device=cpu")
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("error: no model given: add --model_args checkpoint_dir=")
    )


def test_a_command_line_without_model_or_task_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, missing in [
        ([], "--model_args checkpoint_dir=DIRECTORY and --tasks NAMES"),
        (["--tasks", "gsm8k"], "--model_args checkpoint_dir=DIRECTORY"),
        (["--model_args", "checkpoint_dir=hf"], "--tasks NAMES"),
    ]:
        monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "dllm_jepa", *words])
        with pytest.raises(SystemExit) as stopped:
            lm_eval_adapter.main()
        assert stopped.value.code == 1
        assert capsys.readouterr().err == f"error: nothing to evaluate: add {missing}\n"


@pytest.mark.parametrize("checkpoint", ["llada", "dream"], indirect=True)
def test_greedy_is_what_the_model_fills_in_by_itself(harness_model: DLLMJEPAHarnessModel, tokenizer: Tokenizer) -> None:
    model, prompt = harness_model._model, [tokenizer.bos_id, 40, 41]
    tokens = torch.tensor([[*prompt, *[tokenizer.mask_id] * 4]])
    banned = [
        token_id for token_id in range(512) if token_id not in tokenizer.token_ids or token_id == tokenizer.mask_id
    ]
    while bool((tokens == tokenizer.mask_id).any()):
        with torch.no_grad():
            probabilities = model.token_logits(tokens)[0].softmax(-1)
        probabilities[:, banned] = 0
        best, picked = probabilities.max(-1)
        at = int(best.masked_fill(tokens[0] != tokenizer.mask_id, -1).argmax())
        tokens[0, at] = picked[at]
    greedy = tokens[0, 3:].tolist()
    others = [[*greedy[:at], (greedy[at] + 1) % 500, *greedy[at + 1 :]] for at in range(4)]
    requests = [(("", ""), prompt, response) for response in [greedy, *others]]
    found = harness_model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [True, False, False, False, False]


def test_rolling_windows_cover_long_texts_once(harness_model: DLLMJEPAHarnessModel, tokenizer: Tokenizer) -> None:
    text = "lines with the word dog " * 30
    token_ids = tokenizer.encode(text)
    assert len(token_ids) > 96
    found = harness_model.loglikelihood_rolling([instance("loglikelihood_rolling", t) for t in (text, "", "a dog")])
    # The first window has all the context but the bos, the last one as much in front of it as fits.
    bos, left = tokenizer.bos_id, len(token_ids) - 95
    windows = [([bos], token_ids[:95]), (token_ids[95 + left - 96 : 95], token_ids[95:])]
    expected = sum(direct_bound(harness_model._model, tokenizer, *window) for window in windows)
    assert left < 95 and found[0] == pytest.approx(expected, rel=1e-5)
    assert found[1] == 0
    assert found[2] == pytest.approx(direct_bound(harness_model._model, tokenizer, [bos], tokenizer.encode("a dog")))


def test_prompts(harness_model: DLLMJEPAHarnessModel, tokenizer: Tokenizer) -> None:
    assert harness_model.tok_encode("a dog") == [tokenizer.bos_id, *tokenizer.encode("a dog")]
    assert harness_model.tok_encode("a dog", add_special_tokens=False) == tokenizer.encode("a dog")
    chat = [{"role": "system", "content": "be short"}, {"role": "user", "content": "<|end|> a dog"}]
    encoded = tokenizer.encode_chat(chat, add_generation_prompt=True)[0]
    assert harness_model.tok_encode(harness_model.apply_chat_template(chat)) == encoded
    begun = harness_model.apply_chat_template([*chat, {"role": "assistant", "content": "Answer:"}], False)
    assert harness_model.tok_encode(begun) == encoded + tokenizer.encode("Answer:")
    assert harness_model.prefix_token_id == tokenizer.bos_id and harness_model.eot_token_id == tokenizer.eos_id


def test_prompts_and_responses_that_do_not_fit(
    harness_model: DLLMJEPAHarnessModel, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """Long prompts keep their end; a response must have a token and leave room for one in front."""
    prompt, response = list(range(60, 160)), [7, 8]
    with caplog.at_level(logging.WARNING):
        ((value, _),) = harness_model._loglikelihood_tokens([(("a", "b"), prompt, response)], disable_tqdm=True)
    assert value == pytest.approx(direct_bound(harness_model._model, tokenizer, prompt[-94:], response), rel=1e-6)
    assert "1 of 1 prompts are cut on the left to fit into 96 tokens" in caplog.text
    for response in ([], list(range(96))):
        with pytest.raises(ConfigError, match=rf"the response 'b' has {len(response)} tokens"):
            harness_model._loglikelihood_tokens([(("a", "b"), [1], response)])


def test_generation_settings_of_a_task(checkpoint: Path, harness_model: DLLMJEPAHarnessModel) -> None:
    assert harness_model._decoding({}) == llada_decoding(gen_length=256, block_length=256, steps=256)
    sampled = harness_model._decoding({"max_new_tokens": 8, "do_sample": True, "temperature": 0.5, "top_p": 0.9})
    assert sampled == llada_decoding(gen_length=8, block_length=8, steps=8, temperature=0.5, top_p=0.9)
    greedy = harness_model._decoding({"max_gen_toks": 8, "temperature": 0.5, "top_p": 0.9})
    assert greedy == llada_decoding(gen_length=8, block_length=8, steps=8)
    with pytest.raises(ConfigError, match="generation_kwargs: num_beams given; known are"):
        harness_model._decoding({"num_beams": 4})
    with pytest.raises(
        ConfigError, match="256 tokens are to stand behind a prompt, .* context is 96: lower gen_length"
    ):
        harness_model.generate_until([instance("generate_until", "a", {})])


def test_samples_depend_on_the_seed_and_not_on_the_batch(checkpoint: Path) -> None:
    settings = {"max_gen_toks": 8, "do_sample": True, "temperature": 3.0}
    requests = [instance("generate_until", "a dog", settings)] * 3

    def sample(batch_size: int, seed: int) -> list[str]:
        model = DLLMJEPAHarnessModel(str(checkpoint), device="cpu", batch_size=batch_size, seed=seed)
        return model.generate_until(requests, disable_tqdm=True)

    first = sample(1, 0)
    assert first == sample(3, 0) != sample(1, 1)
    assert len(set(first)) > 1


def test_stop_strings_cut_at_the_first_one() -> None:
    assert lm_eval_adapter._before_first(["cd", "bc", "zz"], "abcd") == "a"
    assert lm_eval_adapter._before_first([], "abcd") == "abcd"
    assert lm_eval_adapter._stop_strings({"until": "x"}) == ["x"]
    assert lm_eval_adapter._stop_strings({"until": ["", "y"]}) == ["y"] and lm_eval_adapter._stop_strings({}) == []


@pytest.mark.parametrize("checkpoint", ["dream"], indirect=True)
def test_a_dream_model_has_the_settings_of_its_own_decoding(checkpoint: Path) -> None:
    model = DLLMJEPAHarnessModel(str(checkpoint), device="cpu", gen_length=8, algorithm="entropy", steps=4)
    assert model._decoding({"max_gen_toks": 99}).gen_length == 8
    with pytest.raises(ConfigError, match="model_args: remasking given, which dream_decoding does not take"):
        DLLMJEPAHarnessModel(str(checkpoint), device="cpu", remasking="random")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "fp8"}, ConfigError, "dtype: 'fp8' given, must be fp32 or bf16"),
        ({"batch_size": "auto"}, ConfigError, "batch_size: 'auto' given, must be a number of rows"),
        ({"batch_size": 0}, ConfigError, "batch_size: 0 given"),
        ({"num_samples": 0}, ConfigError, "num_samples: 0 given, must be at least 1"),
        ({"tokenizer": "gpt2"}, ConfigError, "tokenizer: 'gpt2' given, must be one of dream, llada, tiny"),
        ({"gen_length": 256, "steps": 7, "block_length": 128}, ConfigError, "llada_decoding: steps must be a multiple"),
        ({"part": "target"}, CheckpointError, "is no training state"),
        ({"wide": True}, ConfigError, "model_args: wide given, which llada_decoding does not take"),
    ],
)
def test_bad_arguments(checkpoint: Path, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DLLMJEPAHarnessModel(str(checkpoint), **({"device": "cpu"} | arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="device: cuda:0 given or taken by default, but there is no GPU"):
        DLLMJEPAHarnessModel.create_from_arg_string(f"checkpoint_dir={checkpoint}", {"device": "cuda:0"})


def test_a_tokenizer_by_name(checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("tiny", "llada"):
        model = DLLMJEPAHarnessModel(str(checkpoint), device="cpu", tokenizer=name)
        assert model.tok_encode("a dog") == [tokenizer.bos_id, *tokenizer.encode("a dog")]
    save_hf(llada(**(SIZES | {"vocab_size": 320}), max_seq_len=96), tmp_path / "hf", tokenizer=None)
    last = tokenizer.vocab_size - 1
    with pytest.raises(CheckpointError, match=f"hf scores 320 ids, but the tokenizer has ids up to {last}: give"):
        DLLMJEPAHarnessModel(str(tmp_path / "hf"), device="cpu", tokenizer="tiny")
