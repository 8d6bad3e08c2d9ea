"""The evaluation recipe: what it writes is what the parts give by themselves, however it is interrupted or split."""

import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import dllm_jepa_eval
import pytest
import torch

from dllm_jepa.config import load_config
from dllm_jepa.data import generate_regex_pairs
from dllm_jepa.evals import ResultsFolder, nlrx
from dllm_jepa.evals._generation_task import item_seed
from dllm_jepa.generation import llada_decoding
from dllm_jepa.models import load_hf
from dllm_jepa.models.tiny import tiny_tokenizer
from dllm_jepa.training import Ranks
from tests.launching import SMALL_EVAL, eval_here, run_here

ITEMS = 10


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two small models: hardly trained, and a little more."""
    folder = tmp_path_factory.mktemp("models")
    for steps in (2, 40):
        run_here(folder / str(steps), f"max_steps={steps}", "export=online", "lr_scheduler.num_warmup_steps=1")
    return folder / "2" / "hf", folder / "40" / "hf"


def rows_of(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "generations.jsonl").read_text().splitlines()]


def test_results_are_those_of_decoding_and_scoring_by_hand(models: tuple[Path, Path], tmp_path: Path) -> None:
    at_random = ("decoding.temperature=0.8", "seed=3", f"task.num_pairs={ITEMS}", "batch_size=3")
    scores = eval_here(tmp_path / "eval", f"checkpoint_dir={models[1]}", *at_random)
    tokenizer, model = tiny_tokenizer(), load_hf(models[1])
    decoding = llada_decoding(gen_length=8, block_length=8, steps=8, temperature=0.8)
    pairs = generate_regex_pairs(num_pairs=ITEMS, seed=1, split="heldout")
    rows = rows_of(tmp_path / "eval")
    assert [row["item"] for row in rows] == list(range(ITEMS))
    for item, (pair, row) in enumerate(zip(pairs, rows, strict=True)):
        prompt, _ = tokenizer.encode_chat(
            [{"role": "user", "content": pair["description"]}], add_generation_prompt=True
        )
        ids_of = {"mask_id": tokenizer.mask_id, "pad_id": tokenizer.pad_id, "token_ids": tokenizer.token_ids}
        generation = decoding.generate(model, [prompt], seeds=[item_seed(3, item)], **ids_of)
        ids = generation.canvas[0].tolist()
        end = next((at for at, token in enumerate(ids) if token in tokenizer.end_ids), len(ids))
        assert row["prediction"] == tokenizer.decode(ids[:end], skip_special_tokens=False)
        assert row["measures"] == dict(nlrx.score(row["prediction"], pair).measures)
        assert row["gold"] == pair["regex"]
    correct = sum(row["measures"]["functional_match"] for row in rows)
    assert scores["scores"]["functional_match"]["correct"] == correct
    assert scores["num_items"] == ITEMS and scores["seconds"] > 0
    assert len({row["prediction"] for row in rows}) > ITEMS // 2  # the model does not write the same to everything


def test_an_interrupted_evaluation_goes_on(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = (f"checkpoint_dir={models[1]}", "batch_size=2", "decoding.temperature=0.7")
    eval_here(tmp_path / "whole", *overrides)
    kept = ResultsFolder.append
    done: list[int] = []

    def append(self: ResultsFolder, rank: int, batch: int, *rest: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(batch)
        kept(self, rank, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ResultsFolder, "append", append)
        with pytest.raises(SystemExit) as stopped:
            eval_here(tmp_path / "parts", *overrides)
    assert stopped.value.code == 130 and "go on by resume=auto" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "scores.json").exists()
    with pytest.raises(SystemExit):
        eval_here(tmp_path / "parts", *overrides)  # without resume
    assert "already holds an evaluation" in capsys.readouterr().err

    again: list[int] = []

    def count(self: ResultsFolder, rank: int, batch: int, *rest: Any) -> None:
        again.append(batch)
        kept(self, rank, batch, *rest)

    monkeypatch.setattr(ResultsFolder, "append", count)
    eval_here(tmp_path / "parts", *overrides, "resume=auto")
    assert sorted(done + again) == list(range(6 // 2))  # every batch once
    whole, parts = (tmp_path / name / "generations.jsonl" for name in ("whole", "parts"))
    assert parts.read_bytes() == whole.read_bytes()


def test_a_finished_evaluation_is_not_done_again(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = eval_here(tmp_path / "eval", f"checkpoint_dir={models[1]}")

    def load(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("dllm_jepa.trained_model.load_hf", load)
    again = eval_here(tmp_path / "eval", f"checkpoint_dir={models[1]}", "resume=auto")
    assert again["scores"] == first["scores"] and again["seconds"] == first["seconds"]


def test_another_model_or_other_settings_are_not_mixed(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eval_here(tmp_path / "eval", f"checkpoint_dir={models[1]}")
    before = (tmp_path / "eval" / "scores.json").read_bytes()
    for override, named in (
        (f"checkpoint_dir={models[0]}", "model:"),
        ("decoding.steps=4", "steps: 8 there, 4 now"),
        ("task.num_pairs=7", "data_sha256:"),
        ("task.system_prompt=Hello", "system_prompt:"),
        ("seed=5", "seed: 0 there, 5 now"),
    ):
        with pytest.raises(SystemExit):
            eval_here(tmp_path / "eval", f"checkpoint_dir={models[1]}", override, "resume=auto")
        assert named in capsys.readouterr().err, override
    assert (tmp_path / "eval" / "scores.json").read_bytes() == before


def test_a_base_is_evaluated_on_the_same_items_and_compared(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eval_here(tmp_path / "eval", f"checkpoint_dir={models[1]}", f"base_dir={models[0]}")
    shown = capsys.readouterr().out
    base = eval_here(tmp_path / "alone", f"checkpoint_dir={models[0]}")
    in_folder = json.loads((tmp_path / "eval" / "base" / "scores.json").read_text())
    assert in_folder["scores"] == base["scores"]
    assert rows_of(tmp_path / "eval" / "base") == rows_of(tmp_path / "alone")
    assert "A is the base" in shown and "functional_match" in shown and "only A" in shown


def test_a_model_beside_itself_differs_in_nothing(models: tuple[Path, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("lines with a number or the string dog\n" * 40)
    heldout = (
        f"task={{_component_: dllm_jepa.evals.heldout_task, source: {text}, chunk_tokens: 64, num_strata: 4}}",
        "decoding=null",
        "num_shots=null",
        f"checkpoint_dir={models[1]}",
    )
    eval_here(tmp_path / "eval", *heldout, f"base_dir={models[1]}", "batch_size=2")
    own, base = (rows_of(folder) for folder in (tmp_path / "eval", tmp_path / "eval" / "base"))
    assert own == base and len(own) > 2
    eval_here(tmp_path / "other", *heldout, f"base_dir={models[0]}")
    own, base = (rows_of(folder) for folder in (tmp_path / "other", tmp_path / "other" / "base"))
    assert all(one["measures"]["loss"] != two["measures"]["loss"] for one, two in zip(own, base, strict=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(
            ["decoding.gen_length=250", "decoding.block_length=250", "decoding.steps=250"], "context", id="context"
        ),
        pytest.param(
            [
                "num_shots=4",
                "task={_component_: dllm_jepa.evals.nlrx_task, source: few.jsonl, shots_source: few.jsonl}",
            ],
            "num_shots=4, but few.jsonl has only 3 rows",
            id="shots",
        ),
        pytest.param(["task={_component_: dllm_jepa.evals.nlrx_task, source: none.jsonl}"], "none.jsonl", id="no file"),
        pytest.param(["task={_component_: dllm_jepa.evals.nlrx_task, source: bad.jsonl}"], "not UTF-8", id="bytes"),
        pytest.param(["decoding.steps=7", "decoding.block_length=4"], "multiple of the number of blocks", id="steps"),
        pytest.param(["decoding._component_=dllm_jepa.generation.lada_decoding"], "llada_decoding", id="decoding"),
        pytest.param(["task._component_=dllm_jepa.evals.gsm9k_task"], "gsm8k_task", id="task"),
        pytest.param(["part=target"], "no training state", id="part"),
        pytest.param(
            [
                "task={_component_: dllm_jepa.evals.heldout_task, source: few.jsonl, chunk_tokens: 1}",
                "decoding=null",
                "num_shots=null",
            ],
            "task: chunk_tokens must be at least",
            id="chunks",
        ),
        pytest.param(["task.num_pairs=100001"], "task: num_pairs must be between 1 and", id="a builder's word"),
        pytest.param(["base_dir=tests/assets/llada_tiny"], "scores 320 ids, but the tokenizer has", id="a small base"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_weights_are_loaded(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], overrides: list[str], message: str,
) -> None:  # fmt: skip
    assets = Path("tests/assets").absolute()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "assets").symlink_to(assets)
    (tmp_path / "few.jsonl").write_text('{"description": "lines with a number", "regex": ".*[0-9].*"}\n' * 3)
    (tmp_path / "bad.jsonl").write_bytes(b'{"description": "\xff", "regex": ""}\n')
    monkeypatch.setattr("dllm_jepa.trained_model.load_hf", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as stopped:
        eval_here(tmp_path / "eval", f"checkpoint_dir={models[1]}", *overrides)
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()


def test_a_base_with_other_ids_is_refused(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(models[0], tmp_path / "other")
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab[10], vocab[11] = vocab[11], vocab[10]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(SystemExit):
        eval_here(tmp_path / "eval", f"checkpoint_dir={models[1]}", f"base_dir={other}")
    assert "other has another tokenizer than" in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()


def test_the_folder_of_the_base_is_looked_at_first(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    eval_here(tmp_path / "eval" / "base", f"checkpoint_dir={models[0]}")
    monkeypatch.setattr("dllm_jepa.trained_model.load_hf", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit):
        eval_here(tmp_path / "eval", f"checkpoint_dir={models[1]}", f"base_dir={models[0]}")
    assert "base already holds an evaluation" in capsys.readouterr().err


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_batch_belongs_to_one_rank(tmp_path: Path, world_size: int) -> None:
    cfg = dllm_jepa_eval.Config.check(
        load_config([*SMALL_EVAL, f"output_dir={tmp_path}", f"checkpoint_dir={tmp_path}", "resume=auto"])
    )
    source, task = SimpleNamespace(fingerprint="abc"), SimpleNamespace(fingerprint=dict)
    dealt = []
    for rank in range(world_size):
        recipe = dllm_jepa_eval.DLLMJEPAEvalRecipe(cfg, Ranks(rank, world_size, torch.device("cpu")))
        recipe.task, recipe.batches = task, [[item] for item in range(5)]
        with patch.object(Ranks, "on_rank_zero", lambda self, action: action()):
            dealt.append(recipe.open_folder(source, recipe.folder, "online"))
    assert sorted(sum(dealt, [])) == list(range(5))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_a_key_of_ones_own_belongs_to_the_fingerprint(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of the recipe goes on with an evaluation only if its own key is what it was."""
    source = Path(dllm_jepa_eval.__file__).read_text()
    (tmp_path / "own_eval.py").write_text(
        source.replace("    rules = (", "    smoothing: float = 0.1\n\n    rules = (", 1)
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--config", str(tmp_path / "x.yaml")]
    (tmp_path / "x.yaml").write_text(Path("configs/tiny_eval.yaml").read_text())
    start = [*words, *SMALL_EVAL[2:], f"output_dir={tmp_path / 'eval'}", f"checkpoint_dir={models[0]}"]
    for value, code in (("0.3", None), ("0.3", None), ("0.9", 1)):
        monkeypatch.setattr("sys.argv", ["own_eval", *start, f"smoothing={value}", "resume=auto"])
        if code is None:
            importlib.import_module("own_eval").recipe_main()
        else:
            with pytest.raises(SystemExit):
                importlib.import_module("own_eval").recipe_main()
    assert "smoothing" in capsys.readouterr().err
