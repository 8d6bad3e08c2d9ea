"""Our models in lm-evaluation-harness (`lm_eval`), under the name `dllm_jepa`.

    dllm-jepa lm-eval --model_args checkpoint_dir=LLaDA-8B-Instruct --tasks gsm8k

takes all arguments of the command `lm_eval`. The harness has no plug-in point for models: it knows those that are part
of it and those that were registered before it looks, which is what importing this module does. From Python:

    import dllm_jepa.lm_eval_adapter
    lm_eval.simple_evaluate(model="dllm_jepa", model_args={"checkpoint_dir": "LLaDA-8B-Instruct"}, tasks=["gsm8k"])

Needs the extra `dllm-jepa[lm-eval]`.
"""

import inspect
import json
import logging
import pkgutil
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from dllm_jepa.errors import ConfigError, LaunchError, UserError
from dllm_jepa.evals.likelihood import conditional_log_likelihood
from dllm_jepa.generation import Decoding, llada_decoding
from dllm_jepa.models import BUILT_IN_TOKENIZER, DTYPES, FAMILIES, Tokenizer, find_tokenizer, known_tokenizers
from dllm_jepa.trained_model import ModelSource, open_model

_DEFAULT_GEN_LENGTH = 256
# The harness hands a prompt on as text, in which no special token can be told from its name. So a chat travels as JSON.
_CHAT_START = '{"dllm_jepa_chat": '
# Keys of a task's generation_kwargs: names of the longest response, and what goes to the decoding.
_LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_KEYS = ("top_p", "top_k")

_logger = logging.getLogger(__name__)


@register_model("dllm_jepa")
class DLLMJEPAHarnessModel(TemplateLM):
    """A masked diffusion language model for the harness; one process.

    Log-likelihoods are lower bounds, see `conditional_log_likelihood`; greedy is a response that the model fills in by
    itself, its likeliest token first, one token per forward pass.

    Args:
        checkpoint_dir: a Hugging Face directory, an adapter, or a training state.
        part: of a training state, "online" or "target".
        adapter_base: of adapters, directory of their base; None takes the recorded one.
        dtype: type of weights and computation, fp32 or bf16.
        device: device of the model; None takes the GPU if there is one.
        batch_size: rows in one forward pass.
        max_batch_size: not used; the harness passes it on.
        tokenizer: "llada" or "dream" on the files of the model, or "tiny"; None for the model's own.
        num_samples: forward passes for the likelihood of a response, at most.
        seed: seed of all random numbers.
        gen_length: tokens of a canvas; None takes what the task asks for (`max_gen_toks`), or 256.
        block_length: tokens of a block; None for one block.
        steps: forward passes per response; None for as many as tokens.
        decoding: other arguments of `llada_decoding` or, for Dream models, `dream_decoding`.

    Raises:
        ConfigError: an argument is none of these, or out of range.
        CheckpointError: the model or its tokenizer cannot be used.
    """

    def __init__(
        self,
        checkpoint_dir: str,
        part: str = "online",
        adapter_base: str | None = None,
        dtype: str = "fp32",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        tokenizer: str | None = None,
        num_samples: int = 128,
        seed: int = 0,
        gen_length: int | None = None,
        block_length: int | None = None,
        steps: int | None = None,
        **decoding: Any,
    ) -> None:
        """Load the model."""
        super().__init__()
        if dtype not in DTYPES:
            raise ConfigError(f"dtype: {dtype!r} given, must be {' or '.join(DTYPES)}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"batch_size: {batch_size!r} given, must be a number of rows, at least 1")
        if num_samples < 1:
            raise ConfigError(f"num_samples: {num_samples} given, must be at least 1")
        source = open_model(checkpoint_dir, part=part, base=adapter_base)
        self._text_tokenizer = _tokenizer(source, tokenizer)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device: {device} given or taken by default, but there is no GPU: add --device cpu")
        self._batch_size = int(batch_size)
        self._num_samples = num_samples
        self._seed = seed
        self._gen_length = gen_length
        self._decoding_arguments = {"block_length": block_length, "steps": steps, **decoding}
        self._builder: Callable[..., Decoding] = pkgutil.resolve_name(FAMILIES[source.model.family].decoding)
        self._name = f"{source.path} {source.fingerprint[:16]}"
        if unknown := sorted(set(decoding) - set(inspect.signature(self._builder).parameters)):
            raise ConfigError(f"model_args: {', '.join(unknown)} given, which {self._builder.__name__} does not take")
        if gen_length is not None:  # else a task gives it, and with it the other numbers have to go together
            self._decoding({})
        self._model = source.load(DTYPES[dtype], self._device)
        self.max_length = self._model.sizes.max_seq_len

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "DLLMJEPAHarnessModel":
        """Build from model_args, which win over --device and --batch_size: those have defaults."""
        if not arg_dict.get("checkpoint_dir"):
            raise ConfigError("no model given: add --model_args checkpoint_dir=DIRECTORY, with a model in it")
        options = additional_config or {}
        return cls(**{name: value for name, value in options.items() if value is not None} | arg_dict)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "DLLMJEPAHarnessModel":
        """Build from model_args in one string."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-text token."""
        return self._text_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token in front of a text without context: the bos, if there is one."""
        bos_id = self._text_tokenizer.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    @property
    def tokenizer_name(self) -> str:
        """Names encoded prompts of this model in the cache of the harness."""
        return self._name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text, which `tok_encode` turns into the chat format of the model.

        If the last message is the assistant's, the response goes on from it, whatever `add_generation_prompt` says.
        """
        return f"{_CHAT_START}{json.dumps(chat_history)}}}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a chat in the model's format, or of any other text, with the bos in front unless told not to."""
        if string.startswith(_CHAT_START):
            *messages, last = json.loads(string)["dllm_jepa_chat"]
            if last["role"] != "assistant":
                return self._text_tokenizer.encode_chat([*messages, last], add_generation_prompt=True)[0]
            return self._text_tokenizer.encode_chat(messages, add_generation_prompt=True)[0] + (
                self._text_tokenizer.encode(last["content"])
            )
        bos_id = self._text_tokenizer.bos_id
        bos = [] if bos_id is None or add_special_tokens is False else [bos_id]
        return bos + self._text_tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context.startswith(_CHAT_START):
            return self.tok_encode(context), self._text_tokenizer.encode(continuation)
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return pair

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        for (_, text), _, continuation in requests:
            if not 1 <= len(continuation) < self.max_length:
                raise ConfigError(
                    f"the response {text!r:.80} has {len(continuation)} tokens; it must have at least one and fit into "
                    f"the model's context of {self.max_length} with one in front"
                )
        prompts = self._cut([context for context, _ in pairs], [len(continuation) for _, continuation in pairs])
        pairs = [(prompt, continuation) for prompt, (_, continuation) in zip(prompts, pairs, strict=True)]
        results: dict[int, tuple[float, bool]] = {}
        for index, value in self._bounds(pairs, disable_tqdm):
            results[index] = (value, self._is_greedy(*pairs[index]))
            self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
        return [results[index] for index in range(len(requests))]

    def _bounds(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], disable_tqdm: bool
    ) -> Iterator[tuple[int, float]]:
        """Number and log-likelihood of every pair of prompt and response, in no particular order."""
        lengths = [len(prompt) + len(response) for prompt, response in pairs]
        for batch in self._batches(lengths, "log-likelihoods", disable_tqdm):
            found = conditional_log_likelihood(
                self._model,
                [pairs[index][0] for index in batch],
                [pairs[index][1] for index in batch],
                mask_id=self._text_tokenizer.mask_id,
                num_samples=self._num_samples,
                seed=self._seed,
                batch_size=self._batch_size,
            )
            yield from zip(batch, found.tolist(), strict=True)

    def _is_greedy(self, prompt: Sequence[int], response: Sequence[int]) -> bool:
        """Whether the model itself fills in the response; over at the first token that is another one."""
        decoding = llada_decoding(gen_length=len(response), block_length=len(response), steps=len(response))
        wanted = torch.tensor([list(response)], device=self._device)
        for step in decoding.stream(self._model, [prompt], **self._model_arguments()):
            committed = step.canvas != self._text_tokenizer.mask_id
            if bool((committed & (step.canvas != wanted)).any()):
                return False
        return True

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in nats, window by window, each on the context that fits before it."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            # A row holds a window and, in front of it, at least the prefix token.
            pairs = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            windows += map(make_disjoint_window, pairs)
            owners += [number] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for index, value in self._bounds(windows, disable_tqdm):
            totals[owners[index]] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Responses to prompts, without special tokens, cut in front of the first stop string.

        Raises:
            ConfigError: a task asks for something that no decoding has.
        """
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        decodings = {settings: self._decoding(json.loads(settings)) for settings in by_settings}
        responses: dict[int, str] = {}
        for settings, numbers in by_settings.items():
            decoding, stops = decodings[settings], _stop_strings(json.loads(settings))
            prompts = self._cut(
                [self.tok_encode(requests[number].args[0]) or [self.prefix_token_id] for number in numbers],
                [decoding.gen_length] * len(numbers),
            )
            for batch in self._batches([len(prompt) for prompt in prompts], "generations", disable_tqdm):
                texts = self._generate(decoding, [prompts[index] for index in batch], [numbers[i] for i in batch])
                for index, text in zip(batch, texts, strict=True):
                    responses[numbers[index]] = _before_first(stops, text)
                    self.cache_hook.add_partial(
                        "generate_until", requests[numbers[index]].args, responses[numbers[index]]
                    )
        return [responses[number] for number in range(len(requests))]

    def _generate(self, decoding: Decoding, prompts: list[list[int]], numbers: list[int]) -> list[str]:
        generation = decoding.generate(
            self._model,
            prompts,
            stop_ids=sorted(self._text_tokenizer.end_ids),
            seeds=[random.Random(f"{self._seed} {number}").getrandbits(63) for number in numbers],
            **self._model_arguments(),
        )
        canvases = zip(generation.canvas.tolist(), generation.num_tokens, strict=True)
        return [self._text_tokenizer.decode(canvas[:num_tokens]) for canvas, num_tokens in canvases]

    def _decoding(self, task_settings: Mapping[str, Any]) -> Decoding:
        """The decoding for a task's generation_kwargs, under the arguments of the model."""
        known = {"until", "do_sample", "temperature", *_LENGTH_KEYS, *_SAMPLING_KEYS}
        if unknown := sorted(set(task_settings) - known):
            raise ConfigError(f"generation_kwargs: {', '.join(unknown)} given; known are {', '.join(sorted(known))}")
        asked = (task_settings[key] for key in _LENGTH_KEYS if task_settings.get(key) is not None)
        gen_length = int(self._gen_length or next(asked, _DEFAULT_GEN_LENGTH))
        arguments = {"gen_length": gen_length} | self._decoding_arguments
        if task_settings.get("do_sample") and task_settings.get("temperature", 1.0) > 0:
            arguments["temperature"] = task_settings.get("temperature", 1.0)
            arguments |= {key: task_settings[key] for key in _SAMPLING_KEYS if key in task_settings}
        arguments = {key: value for key, value in arguments.items() if value is not None}
        block_length = arguments.setdefault("block_length", gen_length)
        arguments.setdefault("steps", -(-gen_length // block_length) * block_length)
        try:
            return self._builder(**arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self._builder.__name__}: {error}") from None

    def _model_arguments(self) -> dict[str, Any]:
        tokenizer = self._text_tokenizer
        return {
            "mask_id": tokenizer.mask_id,
            "pad_id": tokenizer.pad_id,
            "token_ids": tokenizer.token_ids,
            "device": self._device,
        }

    def _cut(self, prompts: Sequence[list[int]], num_behind: Sequence[int]) -> list[list[int]]:
        """The ends of prompts that do not fit into the context with what stands behind them."""
        if max(num_behind, default=0) >= self.max_length:
            raise ConfigError(
                f"{max(num_behind)} tokens are to stand behind a prompt, but the model's context is {self.max_length}: "
                "lower gen_length"
            )
        room = [self.max_length - count for count in num_behind]
        if num_cut := sum(len(prompt) > fits for prompt, fits in zip(prompts, room, strict=True)):
            _logger.warning(
                f"{num_cut} of {len(prompts)} prompts are cut on the left to fit into {self.max_length} tokens"
            )
        return [prompt[-fits:] for prompt, fits in zip(prompts, room, strict=True)]

    def _batches(self, lengths: Sequence[int], what: str, disable_tqdm: bool) -> Iterator[list[int]]:
        """Numbers of the rows of each batch, longest first."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        with tqdm(total=len(order), desc=what, disable=disable_tqdm) as bar:
            for start in range(0, len(order), self._batch_size):
                yield order[start : start + self._batch_size]
                bar.update(len(order[start : start + self._batch_size]))


def _tokenizer(source: ModelSource, name: str | None) -> Tokenizer:
    """The tokenizer that was asked for, or the model's own."""
    if name is None:
        return source.tokenizer()
    paths = {path.split(".")[-2]: path for path in known_tokenizers()}
    if name not in paths:
        raise ConfigError(f"tokenizer: {name!r} given, must be one of {', '.join(sorted(paths))}")
    builder = find_tokenizer(paths[name])
    assert builder is not None, name
    if paths[name] != BUILT_IN_TOKENIZER and source.tokenizer_dir is None:
        raise ConfigError(f"tokenizer: {name!r} given, but {source.path} has no tokenizer files: leave it out")
    tokenizer = builder() if paths[name] == BUILT_IN_TOKENIZER else builder(source.tokenizer_dir)
    source.check_ids(tokenizer)
    return tokenizer


def _stop_strings(task_settings: Mapping[str, Any]) -> list[str]:
    until = task_settings.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def _before_first(stops: Sequence[str], text: str) -> str:
    """The text up to the first place where one of the stop strings starts."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _check_words(words: Sequence[str]) -> None:
    """Refuse a command line without a model or a task, for which the harness has a traceback."""
    given = {word.partition("=")[0] for word in words}
    if given & {"-h", "--help", "-C", "--config", "ls", "validate"}:
        return
    needed = {"--model_args checkpoint_dir=DIRECTORY": ("-a", "--model_"), "--tasks NAMES": ("-t", "--ta")}
    missing = [what for what, options in needed.items() if not any(word.startswith(options) for word in given)]
    if missing:
        raise LaunchError(f"nothing to evaluate: add {' and '.join(missing)}")


def main() -> None:
    """The command line of the harness, with our models; a `UserError` becomes one message and exit code 1."""
    try:
        _check_words(sys.argv[1:])
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
