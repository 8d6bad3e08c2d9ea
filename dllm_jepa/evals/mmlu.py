r"""Multiple choice in one token (MMLU): the answer is masked, and one forward pass scores every letter exactly.

The template `plain` is the customary text, behind a bos if the tokenizer has one: `The following are multiple choice
questions (with answers) about {subject}.`, then the solved examples and the question, with blank lines between them,
each as `{question}\nA. {choice}\nB. {choice}\nAnswer: {letter}`. The answer to score is the token ` A`. `chat` has that
sentence as system prompt and every example as a user and an assistant turn; the answer to score is `A`.
"""

import string
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, get_args

from tqdm import tqdm

from dllm_jepa.data import Row, Template, check_text, format_prompt, read_rows
from dllm_jepa.errors import CheckpointError, ConfigError, DataError
from dllm_jepa.evals._masked_rows import MaskedRow, candidate_log_probs
from dllm_jepa.evals._shots import Shots, read_solved
from dllm_jepa.evals._task import ItemResult, Score, sha256_of
from dllm_jepa.models import MaskedDiffusionLM, Tokenizer

LETTERS = string.ascii_uppercase
_FIELDS = ("question",)  # of text; the others are checked by `_question`


@dataclass(frozen=True)
class MMLUTask:
    """Questions with lettered choices; made by `mmlu_task`.

    An item is its prompt and one mask, behind which nothing stands; the choice whose letter is the likeliest token
    there is the prediction. `accuracy` is whether it is the right one, `gold_log_prob` the log-probability of the right
    letter among all tokens, in nats.

    Args:
        prompts: token ids in front of each answer.
        letter_ids: ids of the answers A, B, ...; as many as the question with the most choices has.
        prompt_fingerprint: what the prompts were made from (JSON values).
    """

    questions: Sequence["Question"] = field(repr=False)
    prompts: Sequence[Sequence[int]] = field(repr=False)
    letter_ids: Sequence[int]
    tokenizer: Tokenizer
    prompt_fingerprint: Mapping[str, Any]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every prompt and the mask behind it."""
        return [len(prompt) + 1 for prompt in self.prompts]

    def check_context(self, max_seq_len: int) -> None:
        """Refuse prompts that do not fit into a model, naming the longest one; see `EvalTask`."""
        num_tokens, item = max((length, item) for item, length in enumerate(self.lengths))
        if num_tokens > max_seq_len:
            raise ConfigError(
                f"{self.questions[item].name} needs {num_tokens} tokens with num_shots="
                f"{self.prompt_fingerprint['num_shots']}, but the model's context is {max_seq_len}: lower num_shots"
            )

    def fingerprint(self) -> dict[str, Any]:
        """What identifies this evaluation; see `EvalTask`."""
        rows = ([q.question, list(q.choices), q.answer, q.subject] for q in self.questions)
        return {
            "task": "mmlu",
            **self.prompt_fingerprint,
            "num_items": len(self.questions),
            "data_sha256": sha256_of(rows),
            "prompts_sha256": sha256_of([*prompt] for prompt in self.prompts),
        }

    def remarks(self) -> dict[str, Any]:
        """What a reader of the scores has to know; see `EvalTask`."""
        answers = Counter(question.answer for question in self.questions)
        best, count = min(answers.items(), key=lambda pair: (-pair[1], pair[0]))
        constant = {"answer": LETTERS[best], "accuracy": count / len(self.questions)}
        return {"best_constant": constant, "num_subjects": len({question.subject for question in self.questions})}

    def evaluate(self, model: MaskedDiffusionLM, items: Sequence[int], *, batch_size: int) -> list[ItemResult]:
        """Score the letters; see `EvalTask`.

        The record has `subject`, `question`, `prediction` and `gold` (letters) and `log_probs`, by letter.
        """
        rows = []
        for item in items:
            prompt, num_choices = self.prompts[item], len(self.questions[item].choices)
            tokens = [*prompt, self.tokenizer.mask_id]
            rows.append(MaskedRow(tokens, [len(prompt)], [self.letter_ids[:num_choices]]))
        log_probs = candidate_log_probs(model, rows, mask_id=self.tokenizer.mask_id, batch_size=batch_size)
        return [self._judge(item, of_row[0].tolist()) for item, of_row in zip(items, log_probs, strict=True)]

    def _judge(self, item: int, log_probs: Sequence[float]) -> ItemResult:
        question = self.questions[item]
        prediction = max(range(len(log_probs)), key=log_probs.__getitem__)
        measures = {"accuracy": prediction == question.answer, "gold_log_prob": log_probs[question.answer]}
        record = {
            "subject": question.subject,
            "question": question.question,
            "prediction": LETTERS[prediction],
            "gold": LETTERS[question.answer],
            "log_probs": dict(zip(LETTERS, log_probs, strict=False)),
        }
        return ItemResult(item, question.name, Score(measures), 1, record)


@dataclass(frozen=True)
class Question:
    """A question with its choices.

    Args:
        name: where it stands, for messages.
        choices: the answers to choose from, at least two.
        answer: index of the right one.
        subject: what it is about; "" if its row does not say.
    """

    name: str
    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str

    def text(self) -> str:
        """The question and its choices, up to `Answer:`."""
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.question.strip(), *lines, "Answer:"])

    def header(self) -> str:
        """The sentence in front of all questions of its subject."""
        about = f" about {self.subject.replace('_', ' ')}" if self.subject else ""
        return f"The following are multiple choice questions (with answers){about}."


def mmlu_task(
    tokenizer: Tokenizer,
    *,
    source: str,
    seed: int,
    num_shots: int = 5,
    shots_source: str | None = None,
    split: str = "test",
    shots_split: str = "dev",
    name: str | None = None,
    template: Template = "plain",
    max_items: int | None = None,
    progress: bool = True,
) -> MMLUTask:
    """Questions with lettered choices: rows with `question`, `choices` (texts), `answer` (index) and maybe `subject`.

    Args:
        tokenizer: the model's tokenizer.
        source: a .jsonl file, or a hub dataset.
        seed: not used: the shots are the first ones of the same subject.
        num_shots: solved examples in front of each question.
        shots_source: where they come from; None for the same hub dataset. A file needs another file.
        split: split of a hub dataset.
        shots_split: split of the solved examples.
        name: configuration of a hub dataset, such as `all` of cais/mmlu.
        template: `plain` or `chat`.
        max_items: only the first so many; None for all.
        progress: show a progress bar, if stderr is a terminal.

    Raises:
        ConfigError: there are not enough solved examples, or they have no source.
        DataError: a source or a row cannot be used.
        CheckpointError: the tokenizer has no chat format, or no token for a letter.
        ValueError: an argument is out of range.
    """
    if template not in get_args(Template):
        raise ValueError(f"template must be {' or '.join(get_args(Template))}, got {template!r}")
    if max_items is not None and max_items < 1:
        raise ValueError(f"max_items must be at least 1, got {max_items}")
    questions = [_question(row) for row in islice(read_rows(source, fields=_FIELDS, split=split, name=name), max_items)]
    rows, where = read_solved(
        _FIELDS, num_shots, source=source, name=name, shots_source=shots_source, shots_split=shots_split
    )
    solved = defaultdict(list)
    for question in map(_question, rows):
        solved[question.subject].append((question.text(), LETTERS[question.answer]))
    shots = {subject: Shots(pairs, num_shots, f"{where}, subject {subject!r},") for subject, pairs in solved.items()}
    for question in questions:
        if shots and question.subject not in shots:
            raise ConfigError(
                f"num_shots={num_shots}, but {shots_source or source} has no solved example for the subject "
                f"{question.subject!r} of {question.name}: set num_shots=0, or give other examples by task.shots_source"
            )
    letter_ids = _letter_ids(tokenizer, template, max(len(question.choices) for question in questions))
    # None switches the bar off where there is no terminal to draw it on.
    bar = tqdm(questions, desc="prompts of mmlu", unit=" rows", disable=None if progress else True)
    prompts = [_prompt(tokenizer, question, shots, template) for question in bar]
    return MMLUTask(questions, prompts, letter_ids, tokenizer, {"template": template, "num_shots": num_shots})


def _prompt(tokenizer: Tokenizer, question: Question, shots: Mapping[str, Shots], template: Template) -> list[int]:
    """Token ids in front of the answer."""
    examples = shots[question.subject].before(question.text()) if shots else []
    if template == "chat":
        return format_prompt(
            tokenizer, system=question.header(), shots=examples, question=question.text(), template=template
        )
    # In plain text a question ends in `Answer:`, where the package's own template would put a line break.
    solved = [f"{text} {letter}" for text, letter in examples]
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return bos + tokenizer.encode("\n\n".join([question.header(), *solved, question.text()]))


def _letter_ids(tokenizer: Tokenizer, template: Template, num_letters: int) -> list[int]:
    """The ids of the answers, each a single token of its own."""
    answers = [letter if template == "chat" else f" {letter}" for letter in LETTERS[:num_letters]]
    encoded = {answer: tokenizer.encode(answer) for answer in answers}
    cut = [f"{answer!r} is {len(ids)} tokens" for answer, ids in encoded.items() if len(ids) != 1]
    letter_ids = [ids[0] for ids in encoded.values() if len(ids) == 1]
    if cut or len(set(letter_ids)) < num_letters:
        problem = ", ".join(cut) or "two letters have the same token"
        other = "plain" if template == "chat" else "chat"
        raise CheckpointError(
            f"every answer must be one token of its own, but for this tokenizer {problem}: use template: {other}, "
            f"whose answers are written {'with' if template == 'chat' else 'without'} a blank, or another tokenizer"
        )
    return letter_ids


def _question(row: Row) -> Question:
    """Check a row."""
    if missing := [name for name in ("choices", "answer") if name not in row.values]:
        raise DataError(f"{row.name} has no field {', '.join(map(repr, missing))}; it has {', '.join(row.values)}")
    choices, answer, subject = row.values["choices"], row.values["answer"], row.values.get("subject")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{row.name}: field 'choices' must be a list of texts, got {choices!r:.80}")
    if not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"{row.name}: there must be 2 to {len(LETTERS)} choices, got {len(choices)}")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(
            f"{row.name}: field 'answer' must be the index of a choice, 0 to {len(choices) - 1}, got {answer!r:.80}"
        )
    if subject is not None and not isinstance(subject, str):
        raise DataError(f"{row.name}: field 'subject' must be a text, got {subject!r:.80}")
    for text, where in [*((choice, "choices") for choice in choices), (subject or "", "subject")]:
        check_text(text, f"{row.name}: field {where!r}")
    return Question(row.name, row.values["question"], tuple(choices), answer, subject or "")
