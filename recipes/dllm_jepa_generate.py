"""Generate responses with a trained model, and show how they are filled in.

One process; prompts come from the command line, a file or stdin:

    tune run dllm_jepa_generate --config generate checkpoint_dir=LLaDA-8B-Instruct prompt="Why is the sky blue?"
    tune run dllm_jepa_generate --config generate checkpoint_dir=LLaDA-8B-Instruct prompts_file=prompts.jsonl \
        output=responses.jsonl html=responses.html

Responses go to stdout, everything that is said about them to stderr.
"""

import json
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from dllm_jepa import config, preflight
from dllm_jepa.data import check_text, format_prompt, read_rows
from dllm_jepa.errors import ConfigError, DataError, LaunchError
from dllm_jepa.files import write_atomically
from dllm_jepa.generation.show import (
    CanvasHistory,
    Denoising,
    DenoisingView,
    denoising_page,
    encodable,
    is_terminal,
    record_denoising,
    visible,
)
from dllm_jepa.models import DTYPES, MaskedDiffusionLM
from dllm_jepa.trained_model import open_model

ROW_FILES = (".jsonl", ".json")
NUM_SEEDS = 2**32  # as many as the key seed allows


class Config(config.TrainedModel):
    """The keys of generation; those of every recipe that uses a trained model stand in `config.TrainedModel`."""

    prompt: Annotated[
        config.Text | None, config.Verbatim, Field(description="one prompt; null = those of prompts_file")
    ] = None
    prompts_file: Annotated[
        Annotated[config.Text, config.Phrase("a path, or - for stdin")] | None,
        config.Verbatim,
        Field(
            description="a text file with a prompt per line, or a .jsonl file with the field `prompt`; a prompt keeps "
            "stdin unread"
        ),
    ] = None
    template: Annotated[
        Literal["chat", "plain"] | None,
        Field(
            description="chat format of the tokenizer, or plain text; null = what the model was trained with, or chat "
            "if its files do not say"
        ),
    ] = None
    system_prompt: Annotated[
        str | None,
        config.Verbatim,
        Field(
            description="system prompt; empty for none; null = what the model was trained with, or none if its files "
            "do not say"
        ),
    ] = None
    decoding: Annotated[config.Component, Field(description="how responses are generated")]
    show_steps: Annotated[bool, Field(description="show in the terminal how the tokens are filled in")] = True
    html: Annotated[
        Annotated[config.Text, config.Phrase("a path ending in .html")] | None,
        Field(description="write a page on which the denoising can be stepped through; null = none"),
    ] = None
    output: Annotated[
        Annotated[config.Text, config.Phrase("a path ending in .jsonl")] | None,
        Field(description="write prompts and responses, one object per line; null = none"),
    ] = None

    rules = (
        *config.TrainedModel.rules,
        config.rules.decoding_builds,
        config.rules.one_source_of_prompts,
        config.rules.new_files,
        config.rules.one_process,
    )
    opens = (preflight.trained_model_opens,)


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Args:
        name: where it stands, for messages: `prompts.txt line 3`.
        text: the text, not empty.
    """

    name: str
    text: str


class DLLMJEPAGenerateRecipe:
    """Generates a response to every prompt.

    Args:
        cfg: checked config; docs/configs.md lists its keys.
    """

    def __init__(self, cfg: Config) -> None:
        """Hold on to what the responses are made from; `setup` builds its parts."""
        self.cfg = cfg
        self.device = torch.device(cfg.device)
        self.prompts: list[Prompt] = []
        self.num_finished = 0
        self.denoisings: list[Denoising] = []  # for the page

    def setup(self) -> None:
        """Build every part; all that the user may have got wrong comes before weights are loaded."""
        cfg = self.cfg
        self.source = open_model(cfg.checkpoint_dir, part=cfg.part, base=cfg.adapter_base)
        trained = self.source.prompt or {}
        self.template: Any = cfg.template or trained.get("template") or "chat"
        self.system_prompt = trained.get("system_prompt") if cfg.system_prompt is None else cfg.system_prompt
        if cfg.system_prompt is None and self.system_prompt:
            say(f"system prompt, as in training: {self.system_prompt} (system_prompt= for none)")
        self.tokenizer = self.source.tokenizer(cfg.tokenizer)
        self.decoding = cfg.decoding.build()
        self.prompts = self.setup_prompts()
        self.prompt_ids = [self.encode(prompt) for prompt in self.prompts]
        self.view = None
        if cfg.show_steps and is_terminal(sys.stdout):
            self.view = DenoisingView(sys.stdout, self.tokenizer)

    def setup_prompts(self) -> list[Prompt]:
        """The prompts of whichever source the config names."""
        cfg = self.cfg
        if cfg.prompt is not None:
            check_text(cfg.prompt, "prompt")
            return [Prompt("prompt", cfg.prompt)]
        assert cfg.prompts_file is not None, "a rule of the config"
        if Path(cfg.prompts_file).suffix in ROW_FILES:
            return read_row_prompts(cfg.prompts_file)
        if cfg.prompts_file != "-":
            return read_line_prompts(Path(cfg.prompts_file))
        if sys.stdin.isatty():
            say("reading prompts from the keyboard, one a line; Ctrl-D ends")
        return line_prompts("stdin", sys.stdin.buffer)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt in the model's format.

        Raises:
            ConfigError: if it does not fit into the model together with a response.
        """
        ids = format_prompt(self.tokenizer, system=self.system_prompt, question=prompt.text, template=self.template)
        context = self.source.model.sizes.max_seq_len
        if len(ids) + self.decoding.gen_length > context:
            raise ConfigError(
                f"{prompt.name} has {len(ids)} tokens; with {self.decoding.gen_length} for the response "
                f"(decoding.gen_length) that is over the model's context of {context}: shorten either"
            )
        return ids

    def run(self) -> None:
        """Generate batch by batch."""
        self.model: MaskedDiffusionLM = self.source.load(DTYPES[self.cfg.dtype], self.device)
        for start in range(0, len(self.prompts), self.cfg.batch_size):
            batch = range(start, min(start + self.cfg.batch_size, len(self.prompts)))
            seeds = [(self.cfg.seed + index) % NUM_SEEDS for index in batch]
            self.generate(batch, seeds)

    def generate(self, batch: range, seeds: Sequence[int]) -> None:
        """Generate for some of the prompts, and show how the first one of them is answered."""
        self.say_prompt(batch[0])
        history = CanvasHistory(
            len(batch),
            gen_length=self.decoding.gen_length,
            block_length=self.decoding.block_length,
            mask_id=self.tokenizer.mask_id,
        )
        start, seconds = time.perf_counter(), 0.0
        num_passes: Sequence[int] = []
        for step in self.decoding.stream(
            self.model,
            [self.prompt_ids[index] for index in batch],
            mask_id=self.tokenizer.mask_id,
            pad_id=self.tokenizer.pad_id,
            token_ids=self.tokenizer.token_ids,
            stop_ids=sorted(self.tokenizer.end_ids),
            seeds=seeds,
            device=self.device,
        ):
            history.add(step.canvas.cpu())
            num_passes = step.num_passes
            seconds += time.perf_counter() - start  # the time of showing does not count
            self.show_step(history)
            start = time.perf_counter()
        if self.view is not None:
            self.view.clear()
        rows = self.rows(batch, seeds, history, num_passes)
        self.write_output(rows)
        self.num_finished += len(rows)
        if self.cfg.html is not None:
            canvases = zip(rows, history.tokens.tolist(), history.filled_at.tolist(), strict=True)
            self.denoisings += [record_denoising(self.tokenizer, row["prompt"], *canvas) for row, *canvas in canvases]
        self.show_responses(batch, rows, seconds)

    def rows(
        self, batch: range, seeds: Sequence[int], history: CanvasHistory, num_passes: Sequence[int]
    ) -> list[dict[str, Any]]:
        """What the output file says of each prompt of a batch."""
        rows = []
        for index, seed, canvas, passes in zip(batch, seeds, history.tokens.tolist(), num_passes, strict=True):
            end = next((at for at, token_id in enumerate(canvas) if token_id in self.tokenizer.end_ids), None)
            response = canvas[:end]
            rows.append(
                {
                    "prompt": self.prompts[index].text,
                    "response": self.tokenizer.decode(response, skip_special_tokens=False),
                    "finished": end is not None,
                    "num_tokens": len(response),
                    "forward_passes": passes,
                    "seed": seed,
                }
            )
        return rows

    def say_prompt(self, index: int) -> None:
        """Say which prompt is answered next, if there are several."""
        if len(self.prompts) > 1:
            say(f"[{index + 1} of {len(self.prompts)}] {textwrap.shorten(self.prompts[index].text, 100)}")

    def show_step(self, history: CanvasHistory) -> None:
        """Show what the last step has filled in on the first canvas, if it has."""
        if self.view is None:
            return
        new = (history.filled_at[0] == history.num_steps).nonzero().flatten().tolist()
        if new:
            self.view.draw(history.tokens[0].tolist(), new)

    def show_responses(self, batch: range, rows: Sequence[dict[str, Any]], seconds: float) -> None:
        """Write the responses to stdout, and what they took to stderr."""
        rate = sum(row["num_tokens"] for row in rows) / seconds
        for index, row in zip(batch, rows, strict=True):
            if index > batch[0]:
                self.say_prompt(index)
            print(encodable(visible(row["response"]), sys.stdout), flush=True)
            cut = "" if row["finished"] else " (no end of text: cut off at decoding.gen_length)"
            at_once = f" in a batch of {len(rows)}" if len(rows) > 1 else ""
            say(
                f"{row['num_tokens']} tokens{cut}, {row['forward_passes']} forward passes, {rate:.1f} tokens/s{at_once}"
            )

    def write_output(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append to the output file; what is there stays whatever happens later."""
        if self.cfg.output is None:
            return
        try:
            with open(self.cfg.output, "a", encoding="ascii") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as error:
            raise LaunchError(f"output={self.cfg.output} cannot be written: {error.strerror}") from error

    def write_page(self) -> None:
        """Write the page of what is finished."""
        cfg = self.cfg
        if cfg.html is None or not self.denoisings:
            return
        facts = {"model": cfg.checkpoint_dir, "decoding": cfg.decoding.path.rpartition(".")[2]}
        facts |= {key: str(value) for key, value in cfg.decoding.arguments.items()}
        try:
            write_atomically(Path(cfg.html), denoising_page(self.denoisings, facts=facts))
        except OSError as error:
            raise LaunchError(f"html={cfg.html} cannot be written: {error.strerror}") from error
        say(f"wrote {cfg.html}")


def read_row_prompts(path: str) -> list[Prompt]:
    """The field `prompt` of every row of a .jsonl file.

    Raises:
        DataError: if a row has none, or there are no rows.
    """
    prompts = [Prompt(row.name, row.values["prompt"]) for row in read_rows(path, fields=["prompt"])]
    for prompt in prompts:
        if not prompt.text.strip():
            raise DataError(f"{prompt.name}: field 'prompt' is empty")
    return prompts


def read_line_prompts(path: Path) -> list[Prompt]:
    """The lines of a text file; see `line_prompts`."""
    try:
        with path.open("rb") as file:
            return line_prompts(str(path), file)
    except OSError as error:
        raise DataError(f"prompts_file={path} cannot be read: {error.strerror}") from error


def line_prompts(source: str, lines: Iterable[bytes]) -> list[Prompt]:
    """One prompt for each line that is not blank.

    Raises:
        DataError: if a line is not UTF-8, or there are no prompts.
    """
    prompts = []
    for number, line in enumerate(lines, start=1):
        name = f"{source} line {number}"
        try:
            text = line.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{name} is not UTF-8 (byte {error.start + 1} of the line)") from error
        if text.strip():
            prompts.append(Prompt(name, text))
    if not prompts:
        raise DataError(f"{source} has no prompts: give one a line, or give prompt=TEXT")
    return prompts


def say(text: str) -> None:
    """Tell the user something beside the responses."""
    print(encodable(visible(text), sys.stderr), file=sys.stderr, flush=True)


@config.parse
def recipe_main(cfg: Config) -> None:
    """Read the prompts, load the model, generate."""
    recipe = DLLMJEPAGenerateRecipe(cfg)
    try:
        recipe.setup()
        recipe.run()
    except KeyboardInterrupt:
        say(f"\ninterrupted: {recipe.num_finished} of {len(recipe.prompts)} prompts are answered")
        sys.exit(130)
    finally:
        recipe.write_page()  # of what is answered, whatever ended it


if __name__ == "__main__":
    recipe_main()
