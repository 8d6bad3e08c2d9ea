"""How examples (prompts with responses) become sequences: the options that the builders share, and what they do."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from dllm_jepa.data._sequences import SequenceDataset, build_sequences
from dllm_jepa.data._templates import Template, TextTokenizer, close_response

TooLong = Literal["truncate", "refuse"]
# Below this a prompt and a response do not fit, nor do two tokens for each piece of a text.
_MIN_SEQ_LEN = 4


@dataclass(frozen=True)
class ExampleOptions:
    """How examples become sequences: the arguments of `encode_examples`, checked, and what they do."""

    template: Template
    max_seq_len: int
    too_long: TooLong
    eos_fill: int
    canvas_tokens: int | None
    mask_prompt: bool
    shift_logits: bool
    progress: bool

    def __post_init__(self) -> None:
        """Check ranges and what excludes each other."""
        check_choice("template", self.template, get_args(Template))
        check_choice("too_long", self.too_long, get_args(TooLong))
        check_max_seq_len(self.max_seq_len)
        if self.eos_fill < 0:
            raise ValueError(f"eos_fill must be 0 or more tokens, got {self.eos_fill}")
        if self.canvas_tokens is None:
            return
        if self.eos_fill:
            raise ValueError(
                f"eos_fill={self.eos_fill} and canvas_tokens={self.canvas_tokens} exclude each other; give one of them"
            )
        if self.canvas_tokens < 1:
            raise ValueError(f"canvas_tokens must be 1 or more tokens, got {self.canvas_tokens}")

    def collect(
        self,
        tokenizer: TextTokenizer,
        examples: Iterable[tuple[list[int], list[bool], bool, str]],
        *,
        source: str,
        system_prompt: str | None,
    ) -> SequenceDataset:
        """Append the end-of-text tokens to encoded examples, open their prompts to noise if asked to, and collect them.

        An example is its tokens, maskable, whether it has a response, and the name of its row. Without a response
        nothing is maskable, for which `build_sequences` refuses the row.
        """

        def finished() -> Iterator[tuple[list[int], list[bool], str]]:
            for tokens, maskable, has_response, name in examples:
                if not has_response:
                    maskable = [False] * len(tokens)
                else:
                    tokens, maskable = close_response(
                        tokenizer,
                        tokens,
                        maskable,
                        eos_fill=self.eos_fill,
                        canvas_tokens=self.canvas_tokens,
                        max_seq_len=self.max_seq_len,
                    )
                    if self.mask_prompt:
                        maskable = [tokens[0] != tokenizer.bos_id] + [True] * (len(tokens) - 1)
                yield tokens, maskable, name

        return build_sequences(
            finished(),
            source=source,
            max_seq_len=self.max_seq_len,
            too_long=self.too_long,
            shift_logits=self.shift_logits,
            progress=self.progress,
            prompt={"template": self.template, "system_prompt": system_prompt},
        )


def check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not among the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")


def check_max_seq_len(max_seq_len: int) -> None:
    """Refuse a length into which nothing fits."""
    if max_seq_len < _MIN_SEQ_LEN:
        raise ValueError(f"max_seq_len must be at least {_MIN_SEQ_LEN} tokens, got {max_seq_len}")
