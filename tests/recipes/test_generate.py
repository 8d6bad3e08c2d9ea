"""The generation recipe: what it writes is what the decoding gives by itself, wherever the prompts come from."""

import importlib
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_jepa.generation import Decoding, DenoisingStep, dream_decoding, llada_decoding
from dllm_jepa.generation.show import visible
from dllm_jepa.models import InitialWeights, load_hf, save_hf
from dllm_jepa.models.llada import llada
from dllm_jepa.models.tiny import tiny_tokenizer
from tests.generation.test_terminal import Screen

TOKENIZER = tiny_tokenizer()
MANY = ["lines with a number", "words that start with \u4e2d", "x", *(f"word {number}" for number in range(9))]
PROMPTS = MANY[:3]
SMALL = ["decoding.gen_length=6", "decoding.block_length=3", "decoding.steps=6"]
CONTEXT = 48


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model, of which responses differ from prompt to prompt and some end."""
    path = tmp_path_factory.mktemp("models") / "hf"
    sizes = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "mlp_dim": 24}
    with torch.device("meta"):
        model = llada(vocab_size=512, max_seq_len=CONTEXT, rope_base=1e4, norm_eps=1e-5, tie_embeddings=False, **sizes)
    initial = InitialWeights(model, seed=1)
    weights = {name: initial.read(name) * (1 if "norm" in name else 20) for name, _ in model.named_parameters()}
    weights["head.weight"][TOKENIZER.eos_id] *= 2.5  # often the likeliest
    save_hf(model, path, weights=weights.items(), tokenizer=TOKENIZER)
    return path


@pytest.fixture
def generate(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the recipe in this process; returns the objects of its output file."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str, stdin: bytes = b"") -> list[dict[str, Any]]:
        common = [f"checkpoint_dir={model_dir}", "device=cpu", "dtype=fp32", "output=out.jsonl", *SMALL]
        monkeypatch.setattr(sys, "argv", ["recipe", "--config", "generate", *common, *overrides])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        importlib.import_module("dllm_jepa_generate").recipe_main()
        return read(tmp_path / "out.jsonl")

    return run


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def by_hand(
    model_dir: Path, decoding: Decoding, prompts: Sequence[str], *, seed: int = 0, system: str | None = None
) -> list[dict[str, Any]]:
    """What the output file should say, one prompt at a time."""
    model, rows = load_hf(model_dir), []
    for number, prompt in enumerate(prompts):
        messages = [{"role": "system", "content": system}] if system else []
        ids, _ = TOKENIZER.encode_chat([*messages, {"role": "user", "content": prompt}], add_generation_prompt=True)
        generation = decoding.generate(
            model,
            [ids],
            mask_id=TOKENIZER.mask_id,
            pad_id=TOKENIZER.pad_id,
            token_ids=TOKENIZER.token_ids,
            stop_ids=list(TOKENIZER.end_ids),
            seeds=[seed + number],
        )
        (canvas,), (num_tokens,) = generation.canvas.tolist(), generation.num_tokens
        rows.append(
            {
                "prompt": prompt,
                "response": TOKENIZER.decode(canvas[:num_tokens], skip_special_tokens=False),
                "finished": num_tokens < len(canvas),
                "num_tokens": num_tokens,
                "forward_passes": generation.num_passes[0],
                "seed": seed + number,
            }
        )
    return rows


LLADA = llada_decoding(gen_length=6, block_length=3, steps=6)
LINES = "\ufeff" + "\n\n".join(MANY) + "\r\n"  # with a byte order mark, blank lines and a foreign line end


@pytest.mark.parametrize("source", ["lines", "rows", "stdin"])
def test_the_output_is_what_the_decoding_gives_from_every_source(
    source: str, generate: Any, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if source == "rows":
        Path("p.jsonl").write_text("".join(json.dumps({"id": 1, "prompt": prompt}) + "\n" for prompt in MANY))
    Path("p.txt").write_text(LINES, "utf-8", newline="")
    given = {"lines": ["prompts_file=p.txt"], "rows": ["prompts_file=p.jsonl"], "stdin": ["prompts_file=-"]}[source]
    rows = generate(*given, "batch_size=5", stdin=LINES.encode() if source == "stdin" else b"")
    assert rows == by_hand(model_dir, LLADA, MANY)
    assert len({row["response"] for row in rows}) > 3
    assert {row["finished"] for row in rows} == {True, False}
    assert {row["forward_passes"] for row in rows} == {3, 6}  # one ends in the first block
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{visible(row['response'])}\n" for row in rows) and "\x1b" not in captured.err
    for number, row in enumerate(rows, start=1):
        assert f"[{number} of 12] {row['prompt']}\n" in captured.err
        assert (
            f"{row['num_tokens']} tokens" in captured.err and f"{row['forward_passes']} forward passes" in captured.err
        )


def test_one_prompt_with_a_system_prompt_and_another_decoding(generate: Any, model_dir: Path) -> None:
    dream = ["decoding=dllm_jepa.generation.dream_decoding", "decoding.block_length=null", "decoding.temperature=0.9"]
    prompt = ["prompt=lines with a number", "system_prompt=Answer by a regex.", "seed=5"]
    rows = generate(*prompt, *dream, "decoding.algorithm=entropy")
    decoding = dream_decoding(gen_length=6, steps=6, algorithm="entropy", temperature=0.9)
    assert rows == by_hand(model_dir, decoding, PROMPTS[:1], seed=5, system="Answer by a regex.")
    assert rows[0]["response"] != by_hand(model_dir, decoding, PROMPTS[:1], seed=5)[0]["response"]


def test_a_seed_from_the_output_gives_the_same_response_alone(generate: Any, tmp_path: Path) -> None:
    Path("p.txt").write_text("\n".join(PROMPTS), "utf-8")
    rows = generate("prompts_file=p.txt", "decoding.temperature=1.5", "seed=4294967294")
    assert [row["seed"] for row in rows] == [4294967294, 4294967295, 0]
    again = generate(f"prompt={PROMPTS[2]}", "decoding.temperature=1.5", "seed=0", "output=again.jsonl")
    assert again == rows  # the file of the first run is what `generate` reads
    assert read(tmp_path / "again.jsonl") == rows[2:]


def test_the_page_shows_what_was_written(generate: Any, tmp_path: Path) -> None:
    Path("p.txt").write_text("\n".join(PROMPTS), "utf-8")
    rows = generate("prompts_file=p.txt", "html=page.html", "batch_size=2")
    page = (tmp_path / "page.html").read_text("ascii")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    shown = json.loads(data)
    assert [row["prompt"] for row in shown] == PROMPTS
    for row, written in zip(shown, rows, strict=True):
        ended = [cell["is_end"] for cell in row["cells"]]
        response = row["cells"][: ended.index(True) if written["finished"] else None]
        assert "".join(cell["text"] for cell in response) == written["response"]
        assert row["num_steps"] == written["forward_passes"]
        steps = sorted(cell["step"] for cell in row["cells"] if cell["step"] is not None)
        assert steps[0] >= 1 and steps[-1] == row["num_steps"]
    assert "llada_decoding" in page and "block_length" in page


HOSTILE = "a\x1b[2J\x9b5A\r</script>\u202e"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("show_steps", [True, False])
def test_in_a_terminal_the_steps_come_first_and_the_text_stays(
    show_steps: bool, generate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    (row,) = generate(f"prompt={PROMPTS[0]}", f"show_steps={str(show_steps).lower()}")
    frames = terminal.getvalue().split("\x1b[?7l")
    assert len(frames) == (1 + row["forward_passes"] + 1 if show_steps else 1)
    if show_steps:
        assert frames[1].count("\u2591") == 5 and frames[-3].count("\u2591") == 1
    screen = Screen(80, 24)
    screen.feed(terminal.getvalue())
    assert screen.text() == [row["response"], ""]


@pytest.mark.parametrize(
    ("overrides", "stdin", "message"),
    [
        (["prompt=" + "x" * 43], b"", f"prompt has 4[4-9] tokens; with 6 for the response .* context of {CONTEXT}"),
        (["prompts_file=p.jsonl"], b"", r"p.jsonl line 2: field 'prompt' is empty"),
        ([], b"fine\ncaf\xe9", r"stdin line 2 is not UTF-8 \(byte 4 of the line\)"),
        (["prompt="], b"fine", 'prompt: "" given, must be a text or null'),
        (["prompt=caf\udce9"], b"", "prompt holds half of a surrogate pair"),
        ([], b" \n\n", "stdin has no prompts"),
        (["prompt=x", "prompts_file=p.jsonl"], b"", "both given"),
        (["prompts_file=null"], b"", "neither given"),
        (["prompts_file=absent.txt"], b"", "'absent.txt' is not a file"),
        (["prompt=x", "output=p.jsonl"], b"", "output: 'p.jsonl' exists and is kept"),
        (["prompt=x", "html=page.txt"], b"", "html: 'page.txt' given, must end in .html"),
        (["prompt=x", "html=no/page.html"], b"", "the folder 'no' does not exist"),
        (["prompt=x", "decoding.steps=7"], b"", r"decoding: steps must be a multiple of the number of blocks \(2\)"),
    ],
)
def test_what_is_wrong_is_said_before_weights_are_loaded(
    overrides: list[str],
    stdin: bytes,
    message: str,
    generate: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("p.jsonl").write_text('{"prompt": "a"}\n{"prompt": " "}\n')

    def load(*_: Any) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("dllm_jepa.trained_model.load_hf", load)
    with pytest.raises(SystemExit) as stopped:
        generate(*overrides, stdin=stdin)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize("prompt", ["Q: 2 + 2 = ?", "a #b", "[a, b]", "42", "${x} \\${y}", "- a", "it's", "yes", "*x"])
def test_a_prompt_on_the_command_line_is_no_yaml(prompt: str, generate: Any) -> None:
    assert [row["prompt"] for row in generate(f"prompt={prompt}", "prompts_file=-")] == [prompt]


def test_a_prompt_may_fill_the_context_and_no_more(generate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    marks, _ = TOKENIZER.encode_chat([{"role": "user", "content": ""}], add_generation_prompt=True)
    num_letters = CONTEXT - 6 - len(marks)
    assert TOKENIZER.encode("\x00" * num_letters) == TOKENIZER.encode("\x00") * num_letters
    Path("fits.jsonl").write_text(json.dumps({"prompt": "\x00" * num_letters}))
    Path("over.jsonl").write_text(json.dumps({"prompt": "\x00" * (num_letters + 1)}))
    with pytest.raises(SystemExit):
        generate("prompts_file=over.jsonl")
    assert "over.jsonl line 1 has 43 tokens; with 6 for the response" in capsys.readouterr().err
    assert len(generate("prompts_file=fits.jsonl")) == 1


def test_a_hostile_response_is_kept_and_shown_as_text(
    generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal, canvas = Terminal(), torch.tensor([TOKENIZER.encode(HOSTILE)])
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(Decoding, "stream", lambda *_, **__: iter([DenoisingStep(canvas, [1])]))
    length = canvas.size(1)
    lengths = [f"decoding.{name}={length}" for name in ("gen_length", "block_length", "steps")]
    (row,) = generate("prompt=x", "html=page.html", "show_steps=false", *lengths)
    assert row["response"] == HOSTILE
    assert terminal.getvalue() == "a\\x1b[2J\\x9b5A\\r</script>\\u202e\n"
    written = (tmp_path / "page.html").read_text("ascii") + (tmp_path / "out.jsonl").read_text("ascii")
    assert not [character for character in written if ord(character) < 32 and character != "\n"]
    assert written.count("</script>") == 2 + 1  # the page's own, and JSON in the output file


def test_an_interruption_leaves_what_is_finished(
    generate: Any, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.txt").write_text("\n".join(PROMPTS), "utf-8")
    stream = Decoding.stream

    def interrupted(self: Decoding, model: Any, prompts: Any, **rest: Any) -> Any:
        for number, step in enumerate(stream(self, model, prompts, **rest)):
            if len(prompts) == 1 and number == 2:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(Decoding, "stream", interrupted)
    with pytest.raises(SystemExit) as stopped:
        generate("prompts_file=p.txt", "batch_size=2", "html=page.html")
    assert stopped.value.code == 130
    assert "interrupted: 2 of 3 prompts are answered" in capsys.readouterr().err
    monkeypatch.undo()
    assert read(tmp_path / "out.jsonl") == by_hand(model_dir, LLADA, PROMPTS[:2])
    assert '"prompt": "x"' not in (tmp_path / "page.html").read_text("ascii")
