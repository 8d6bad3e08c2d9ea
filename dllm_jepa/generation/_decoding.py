"""The denoising loop: a canvas of masks behind every prompt, filled block by block, the surest tokens first.

Shape legend: B rows, G tokens of a canvas, m scored tokens of a row, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor

from dllm_jepa.errors import CheckpointError
from dllm_jepa.generation._canvas import Canvases, build_rows
from dllm_jepa.generation._sampling import CONFIDENCES, RowNoise, Sampling, perturbed
from dllm_jepa.generation._schedules import Schedule, SpeedUp
from dllm_jepa.generation._scoring import (
    Cache,
    CachedScorer,
    DenoisingModel,
    Scorer,
    StepLogits,
    exact_scorer,
    guided_scorer,
)

# Tokens that are sampled at a time. Where logits are sorted this takes up to 40 bytes each: 1.2 GiB with 126,464 ids.
# The random numbers of a row are drawn for as many tokens at a time, so those of longer rows depend on the number.
_TOKENS_AT_A_TIME = 256


@dataclass(frozen=True)
class DenoisingStep:
    """What is on the canvases after a step.

    Args:
        canvas: int64 [B, G], the tokens behind each prompt, masks included.
        num_passes: forward passes that each row has needed so far.
    """

    canvas: Tensor
    num_passes: list[int]


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Args:
        canvas: int64 [B, G], the tokens behind each prompt; behind the first stop id of a row stands padding.
        num_tokens: tokens of each row in front of its first stop id; G where there is none.
        num_passes: forward passes that each row needed; rows beside it do not count.
        trace: the canvas [B, G] after every step, the masks that were left included; empty unless asked for.
    """

    canvas: Tensor
    num_tokens: list[int]
    num_passes: list[int]
    trace: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Decoding:
    """Fills the blocks of a canvas from left to right; made by `llada_decoding`, `dream_decoding`, or of other parts.

    Every step scores the masked tokens of the block, picks a token for each, and commits those that the model is
    surest of. A committed token stays. A prompt of n tokens needs a context of n + `gen_length` tokens.

    Args:
        schedule: how many tokens each step of a block commits.
        confidence: how sure a token is; a key of `CONFIDENCES`.
        alg_temp: draw the order in which tokens are committed from the softmax of the confidences divided by this; 0
            takes the highest.
        speed_up: commits more tokens than the schedule plans, and at least one a step.
        cache: `none` is exact. `prefix` and `dual` feed only the canvas from the block on, or the block, and attend to
            keys and values from the start of the block elsewhere: approximate.
        cache_refresh: compute all keys and values anew every so many steps of a block too; 1 is exact.

    Raises:
        ValueError: an argument is out of range, or two do not go together.
    """

    gen_length: int
    block_length: int
    schedule: Schedule
    sampling: Sampling
    confidence: str
    alg_temp: float = 0.0
    speed_up: SpeedUp | None = None
    cache: Cache = "none"
    cache_refresh: int | None = None
    cfg_scale: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments that no part has checked."""
        count_blocks(self.gen_length, self.block_length)
        if self.confidence not in CONFIDENCES:
            raise ValueError(f"confidence must be one of {', '.join(CONFIDENCES)}, got {self.confidence!r}")
        if not self.alg_temp >= 0:
            raise ValueError(f"alg_temp must be at least 0, got {self.alg_temp}")
        if self.cache not in get_args(Cache):
            raise ValueError(f"cache must be one of {', '.join(get_args(Cache))}, got {self.cache!r}")
        if self.cache_refresh is not None and self.cache_refresh < 1:
            raise ValueError(f"cache_refresh must be at least 1, or None, got {self.cache_refresh}")
        if self.cache_refresh is not None and self.cache == "none":
            raise ValueError(
                f"cache_refresh={self.cache_refresh} needs a cache: cache must be prefix or dual, got 'none'"
            )
        if not self.cfg_scale >= 0:
            raise ValueError(f"cfg_scale must be at least 0, got {self.cfg_scale}")
        if self.cfg_scale > 0 and self.cache != "none":
            raise ValueError(f"cfg_scale={self.cfg_scale} goes with cache='none' only, got {self.cache!r}")

    @property
    def is_random(self) -> bool:
        """Whether results depend on random numbers."""
        is_random = self.schedule.is_random or self.confidence == "random"
        return is_random or self.sampling.temperature > 0 or self.alg_temp > 0

    def generate(
        self,
        model: DenoisingModel,
        prompts: Sequence[Sequence[int]],
        *,
        mask_id: int,
        pad_id: int,
        token_ids: Collection[int] | None = None,
        stop_ids: Collection[int] = (),
        seeds: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        trace: bool = False,
    ) -> Generation:
        """Generate for a batch of prompts of any lengths; what comes out for one does not depend on the others.

        Args:
            model: the model, in evaluation mode.
            prompts: token ids, at least one per prompt.
            mask_id: id of the mask token, which is never sampled.
            pad_id: id that stands behind shorter rows, where the model does not see it, and behind a stop id.
            token_ids: ids that may be sampled, those that have a token; None allows all that the model scores.
            stop_ids: ids that end a response. A row is finished after the block in which one was sampled, which leaves
                all tokens up to the first one as they would have been.
            seeds: of the random numbers, one per prompt; needed if `is_random`.
            device: device of the model.
            trace: keep the canvas after every step.

        Raises:
            CheckpointError: the logits of the model are not finite numbers; noticed at the end of a block.
            ValueError: prompts, ids or seeds cannot be used.
        """
        steps = self.stream(
            model,
            prompts,
            mask_id=mask_id,
            pad_id=pad_id,
            token_ids=token_ids,
            stop_ids=stop_ids,
            seeds=seeds,
            device=device,
        )
        snapshots = []
        for state in steps:
            if trace:
                snapshots.append(state.canvas)
        is_stop = torch.isin(state.canvas, torch.tensor(list(stop_ids), dtype=torch.int64, device=device))
        num_tokens: list[int] = (is_stop.cumsum(1) == 0).sum(1).tolist()
        return Generation(state.canvas, num_tokens, state.num_passes, snapshots)

    def stream(
        self,
        model: DenoisingModel,
        prompts: Sequence[Sequence[int]],
        *,
        mask_id: int,
        pad_id: int,
        token_ids: Collection[int] | None = None,
        stop_ids: Collection[int] = (),
        seeds: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Iterator[DenoisingStep]:
        """The canvases after every step; the last one holds what `generate` returns. Arguments and errors as there."""
        _check_call(prompts, mask_id, token_ids, stop_ids)
        if self.is_random and seeds is None:
            raise ValueError("seeds must be given, one per prompt: this decoding draws random numbers")
        if seeds is not None and len(seeds) != len(prompts):
            raise ValueError(f"seeds must be one per prompt ({len(prompts)}), got {len(seeds)}")
        rows = build_rows(
            prompts,
            gen_length=self.gen_length,
            mask_id=mask_id,
            pad_id=pad_id,
            seeds=seeds if self.is_random and seeds is not None else (),
            device=device,
        )
        canvases = Canvases(rows, stop_ids=stop_ids, pad_id=pad_id)
        return self._denoise(canvases, self._scorer(model, mask_id), _Banned(mask_id, token_ids))

    def _scorer(self, model: DenoisingModel, mask_id: int) -> Scorer:
        if self.cfg_scale > 0:
            return guided_scorer(model, self.cfg_scale, mask_id)
        return exact_scorer(model) if self.cache == "none" else CachedScorer(model, self.cache, self.cache_refresh)

    @torch.no_grad()
    def _denoise(self, canvases: Canvases, score: Scorer, banned: "_Banned") -> Iterator[DenoisingStep]:
        num_passes = [0] * len(canvases.rows.prompts)
        for start in range(0, self.gen_length, self.block_length):
            canvases.open_block(start, min(start + self.block_length, self.gen_length))
            is_finite = torch.ones((), dtype=torch.bool, device=canvases.rows.tokens.device)
            for step in range(self.schedule.steps):
                wanted = self._plan(canvases, step)
                if not any(wanted):
                    continue
                for prompt, count in zip(canvases.rows.prompts, wanted, strict=True):
                    num_passes[prompt] += count > 0
                is_finite &= self._fill(canvases, score, banned, step, wanted)
                is_full = not any(canvases.left)
                if is_full:
                    _check_finite(is_finite)  # only now: the host waits for the device
                    canvases.close_block()
                yield DenoisingStep(canvases.now(), list(num_passes))
                if is_full:
                    break
            if not canvases.rows.prompts:
                return

    def _plan(self, canvases: Canvases, step: int) -> list[int]:
        """Tokens to commit in each row at the least; a row with none takes no part in the step."""
        wanted = self.schedule.plan(canvases.left, step, canvases.rows.generators)
        return wanted if self.speed_up is None else [max(count, 1) for count in wanted]

    def _fill(self, canvases: Canvases, score: Scorer, banned: "_Banned", step: int, wanted: list[int]) -> Tensor:
        """One step: score the masked tokens, pick a token for each, and commit the surest ones.

        Returns whether the logits were numbers, bool [] on the device of the model.
        """
        asked = [left if count else 0 for left, count in zip(canvases.left, wanted, strict=True)]
        columns, masked = canvases.first_masked(max(asked))  # [B, m]
        noise = RowNoise(canvases.rows.generators, asked, columns.size(1))
        picked, confidence, is_finite = self._pick(score(canvases, columns, step), banned, noise)  # [B, m] twice
        if self.alg_temp > 0:
            confidence = perturbed(confidence, self.alg_temp, noise)
        ordered, order = confidence.masked_fill(~masked, -torch.inf).sort(dim=1, descending=True, stable=True)
        count = torch.tensor(wanted, device=order.device)[:, None] if len(set(wanted)) > 1 else wanted[0]
        is_among_first = torch.arange(order.size(1), device=order.device).expand_as(order) < count
        left: list[int] | None = [num - count for num, count in zip(canvases.left, wanted, strict=True)]
        if self.speed_up is not None:
            is_among_first = is_among_first | self.speed_up.may_commit(ordered)
            left = None
        canvases.commit(columns, picked, torch.zeros_like(masked).scatter(1, order, is_among_first), left)
        return is_finite

    def _pick(self, logits: StepLogits, banned: "_Banned", noise: RowNoise) -> tuple[Tensor, Tensor, Tensor]:
        """A token for each place, int64 [B, m], how sure it is, fp32 [B, m], and whether logits are finite, bool []."""
        given = logits.given
        picked = torch.empty(given.shape[:2], dtype=torch.int64, device=given.device)
        confidence = torch.empty(given.shape[:2], dtype=torch.float32, device=given.device)
        highest = torch.empty_like(confidence)
        for part in _parts(*given.shape[:2]):
            of_part, part_noise = logits.part(*part), noise.part(*part)  # fp32 [b, n, V]
            picked[part], scores = self.sampling(of_part, banned.among(given), part_noise)
            confidence[part] = CONFIDENCES[self.confidence](scores, picked[part], part_noise)
            highest[part] = of_part.amax(-1)  # NaN where any logit is
        return picked, confidence, highest.isfinite().all()


class _Banned:
    """The ids that are never sampled: the mask, and those without a token."""

    def __init__(self, mask_id: int, token_ids: Collection[int] | None) -> None:
        self._mask_id = mask_id
        self._token_ids = token_ids
        self._banned: Tensor | None = None

    def among(self, logits: Tensor) -> Tensor:
        """Bool [V], for logits [..., V]; computed once."""
        if self._banned is None:
            self._banned = torch.full(logits.shape[-1:], self._token_ids is not None, device=logits.device)
            if self._token_ids is not None:
                self._banned[torch.tensor(list(self._token_ids), device=logits.device)] = False
            self._banned[self._mask_id] = True
        return self._banned


def _parts(num_rows: int, num_columns: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of no more than `_TOKENS_AT_A_TIME` tokens: whole rows, or pieces of one.

    A row is cut at the same columns whatever stands beside it: its random numbers come in the same order.
    """
    rows_at_a_time = max(1, _TOKENS_AT_A_TIME // num_columns)
    for row in range(0, num_rows, rows_at_a_time):
        for column in range(0, num_columns, _TOKENS_AT_A_TIME):
            columns = slice(column, min(column + _TOKENS_AT_A_TIME, num_columns))
            yield slice(row, row + rows_at_a_time), columns


def _check_finite(is_finite: Tensor) -> None:
    if not is_finite:
        raise CheckpointError(
            "the model's logits are not finite numbers: its weights hold NaN or infinite values, or overflow in this "
            "dtype; use another checkpoint of the run, or load it with dtype=fp32"
        )


def count_blocks(gen_length: int, block_length: int) -> int:
    """Blocks of a canvas, the last of which may be shorter."""
    if gen_length < 1:
        raise ValueError(f"gen_length must be at least 1, got {gen_length}")
    if not 1 <= block_length <= gen_length:
        raise ValueError(f"block_length must be between 1 and gen_length ({gen_length}), got {block_length}")
    return -(-gen_length // block_length)


def _check_call(
    prompts: Sequence[Sequence[int]], mask_id: int, token_ids: Collection[int] | None, stop_ids: Collection[int]
) -> None:
    if not prompts or not all(prompts):
        raise ValueError("there must be at least one prompt, and a token in each of them")
    if token_ids is not None and all(token_id == mask_id for token_id in token_ids):
        raise ValueError("token_ids must hold an id besides that of the mask")
    if mask_id in stop_ids:
        raise ValueError(f"stop_ids must not hold the id of the mask ({mask_id}), which is never sampled")
