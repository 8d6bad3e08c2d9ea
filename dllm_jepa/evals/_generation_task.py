"""Tasks whose responses are generated: rows become prompts, prompts generations, and generations scores."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from tqdm import tqdm

from dllm_jepa.data import Row, Task, Template, format_prompt, naming
from dllm_jepa.errors import ConfigError
from dllm_jepa.evals._shots import Shots
from dllm_jepa.evals._task import ItemResult, Score, described, sha256_of
from dllm_jepa.generation import Decoding
from dllm_jepa.models import MaskedDiffusionLM, Tokenizer


@dataclass(frozen=True)
class Scoring:
    """How predictions are judged.

    Args:
        score: from a prediction and the fields of its row to a score; it never raises on a prediction.
        check: raises DataError if the gold response of a row is none.
        fingerprint: settings that may change a score (JSON values).
        remarks: what a reader of the scores has to know, from the rows.
    """

    score: Callable[[str, Mapping[str, Any]], Score]
    check: Callable[[Mapping[str, Any]], object] = lambda row: None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    remarks: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]] = lambda rows: {}


@dataclass(frozen=True)
class PromptFormat:
    """What stands in front of a response.

    Args:
        task: its question, and the system prompt unless another one is given.
        shots: solved examples in front of each question.
        system_prompt: in place of the task's own; "" for none; None for the task's own.
    """

    task: Task
    shots: Shots
    template: Template
    system_prompt: str | None

    def __post_init__(self) -> None:
        """Check the choice."""
        if self.template not in get_args(Template):
            raise ValueError(f"template must be {' or '.join(get_args(Template))}, got {self.template!r}")

    @property
    def system(self) -> str:
        """The system prompt."""
        return self.task.system_prompt if self.system_prompt is None else self.system_prompt

    def encode(self, tokenizer: Tokenizer, row: Mapping[str, Any]) -> list[int]:
        """Token ids in front of the response of a row."""
        question = self.task.question(row)
        shots = self.shots.before(question)
        return format_prompt(tokenizer, system=self.system, shots=shots, question=question, template=self.template)

    def cut(self, response: str) -> str:
        """A response up to where the next example would follow: a base model goes on with one of its own."""
        return response.partition("\n\n")[0] if self.template == "plain" else response

    def fingerprint(self) -> dict[str, Any]:
        """What identifies these prompts (JSON values)."""
        return {
            "template": self.template,
            "system_prompt": self.system,
            "num_shots": self.shots.num_shots,
            "shots_sha256": sha256_of(list(example) for example in self.shots.usual),
        }


@dataclass(frozen=True)
class GenerationTask:
    """Questions to which a model generates responses; made by `build_generation_task`.

    Args:
        name: what the task is called in scores.json.
        prompts: token ids in front of each response.
    """

    name: str
    rows: Sequence[Row] = field(repr=False)
    prompts: Sequence[Sequence[int]] = field(repr=False)
    prompt_format: PromptFormat
    scoring: Scoring
    tokenizer: Tokenizer
    decoding: Decoding
    seed: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of every prompt and its canvas."""
        return [len(prompt) + self.decoding.gen_length for prompt in self.prompts]

    def check_context(self, max_seq_len: int) -> None:
        """Refuse prompts that do not fit into a model, naming the longest one; see `EvalTask`."""
        num_tokens, item = max((length, item) for item, length in enumerate(self.lengths))
        if num_tokens > max_seq_len:
            shots = "num_shots or " if self.prompt_format.shots.num_shots else ""
            advice = f"lower {shots}decoding.gen_length"
            if len(self.prompts[item]) >= max_seq_len and not shots:
                advice = (
                    "the prompt alone is too long: take a shorter system prompt, leave the row out, or take a model"
                )
                advice += " with a longer context"
            raise ConfigError(
                f"{self.rows[item].name} needs {num_tokens} tokens, {len(self.prompts[item])} for the prompt and "
                f"{self.decoding.gen_length} (decoding.gen_length) for the response, but the model's context is "
                f"{max_seq_len}: {advice}"
            )

    def fingerprint(self) -> dict[str, Any]:
        """What identifies this evaluation; see `EvalTask`."""
        fields = self.prompt_format.task.fields
        return {
            "task": self.name,
            "num_items": len(self.rows),
            "data_sha256": sha256_of([row.values[name] for name in fields] for row in self.rows),
            **self.prompt_format.fingerprint(),
            "prompts_sha256": sha256_of(self.prompts),
            "decoding": described(self.decoding),
            "seed": self.seed,
            **self.scoring.fingerprint,
        }

    def remarks(self) -> dict[str, Any]:
        """What a reader of the scores has to know; see `EvalTask`."""
        return self.scoring.remarks([row.values for row in self.rows])

    def evaluate(self, model: MaskedDiffusionLM, items: Sequence[int], *, batch_size: int) -> list[ItemResult]:
        """Generate and score; see `EvalTask`. Tokens behind the end of a response do not count.

        The record has `question`, `prompt` (all of it), `prediction` (what stands in front of the first token that ends
        a text or a turn, other special tokens included, and with the template `plain` in front of the first blank
        line), `gold`, `finished` (whether there was such an end) and `num_passes` (forward passes).
        """
        device = next(model.parameters()).device
        results: list[ItemResult] = []
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            generation = self.decoding.generate(
                model,
                [self.prompts[item] for item in batch],
                mask_id=self.tokenizer.mask_id,
                pad_id=self.tokenizer.pad_id,
                token_ids=self.tokenizer.token_ids,
                stop_ids=sorted(self.tokenizer.end_ids),
                seeds=[item_seed(self.seed, item) for item in batch],
                device=device,
            )
            results += map(self._judge, batch, generation.canvas.tolist(), generation.num_tokens, generation.num_passes)
        return results

    def _judge(self, item: int, canvas: Sequence[int], num_tokens: int, num_passes: int) -> ItemResult:
        """The result of an item, of whose canvas `num_tokens` stand in front of the end."""
        row = self.rows[item]
        response = self.tokenizer.decode(canvas[:num_tokens], skip_special_tokens=False)
        prediction = self.prompt_format.cut(response)
        with naming(row):
            score = self.scoring.score(prediction, row.values)
        record = {
            "question": self.prompt_format.task.question(row.values),
            "prompt": self.tokenizer.decode(self.prompts[item], skip_special_tokens=False),
            "prediction": prediction,
            "gold": row.values[self.prompt_format.task.response_field],
            "finished": num_tokens < len(canvas) or prediction != response,
            "num_passes": num_passes,
        }
        return ItemResult(item, row.name, score, num_tokens, record)


def build_generation_task(
    name: str,
    rows: Sequence[Row],
    prompt_format: PromptFormat,
    scoring: Scoring,
    tokenizer: Tokenizer,
    decoding: Decoding,
    *,
    seed: int,
    max_items: int | None,
    progress: bool,
) -> GenerationTask:
    """Check the gold responses and encode the prompts, all before a model is loaded.

    `name` is what the task is called in scores.json; of `rows` the first `max_items` are taken, all of them for None.

    Raises:
        ConfigError: there are not enough shots.
        DataError: a row cannot be used.
        CheckpointError: the tokenizer has no chat format.
        ValueError: `max_items` is below 1.
    """
    if max_items is not None and max_items < 1:
        raise ValueError(f"max_items must be 1 or more, got {max_items}")
    rows, prompts = rows[:max_items], []
    # None switches the bar off where there is no terminal to draw it on.
    for row in tqdm(rows, desc=f"prompts of {name}", unit=" rows", disable=None if progress else True):
        with naming(row):
            scoring.check(row.values)
            prompts.append(prompt_format.encode(tokenizer, row.values))
    return GenerationTask(name, rows, prompts, prompt_format, scoring, tokenizer, decoding, seed)


def item_seed(seed: int, item: int) -> int:
    """Seed of an item's random numbers, whatever batch it is in; in [0, 2^63)."""
    digest = hashlib.blake2b(f"{seed} {item}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
