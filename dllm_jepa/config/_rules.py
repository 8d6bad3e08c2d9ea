"""Rules across config keys, one small function each.

A rule's parameters are named like the keys that it reads, and it is called only when all of these are valid by
themselves. It returns one line per problem: key, value given, what is allowed, what to do.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Launch:
    """The processes and GPUs of this run, as torchrun and torch tell them.

    Args:
        world_size: Processes of the run.
        local_world_size: Processes on this machine.
        num_gpus: CUDA GPUs that torch sees on this machine.
    """

    world_size: int = 1
    local_world_size: int = 1
    num_gpus: int = 0

    @classmethod
    def from_environment(cls) -> "Launch":
        """Read torchrun's variables and count the GPUs."""
        import torch  # seconds to import; `dllm-jepa ls` must not pay for it

        return cls(
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            num_gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        )


def jepa_parts_present(jepa_weight: float, predictor: object, target_encoder: object) -> list[str]:
    """With a JEPA loss there must be something to compute it with."""
    if jepa_weight == 0:
        return []
    parts = {"predictor": predictor, "target_encoder": target_encoder}
    return [
        f"{name}: null, but jepa_weight is {jepa_weight}; give {name}._component_, or set jepa_weight: 0"
        for name, part in parts.items()
        if part is None
    ]


def one_jepa_schedule(jepa_every: int, jepa_ratio: float | None) -> list[str]:
    """Two ways of thinning out the target branch exclude each other."""
    if jepa_every == 1 or jepa_ratio is None:
        return []
    return [f"jepa_every: {jepa_every} together with jepa_ratio: {jepa_ratio}; set jepa_every: 1 or jepa_ratio: null"]


def shuffling_has_targets(shuffle_targets: bool, jepa_weight: float, global_batch_size: int) -> list[str]:
    """A permutation of targets without a fixed point needs targets, and two of them."""
    problems = []
    if shuffle_targets and jepa_weight == 0:
        problems.append(
            "shuffle_targets: true, but jepa_weight is 0, so there are no targets; set shuffle_targets: false or "
            "jepa_weight > 0"
        )
    if shuffle_targets and global_batch_size < 2:
        problems.append(
            f"shuffle_targets: true needs two sequences to exchange targets, but global_batch_size is "
            f"{global_batch_size}; set it to 2 or more"
        )
    return problems


def one_fill(dataset: Mapping[str, Any]) -> list[str]:
    """A response is filled by a number of tokens or up to a number of tokens, not both."""
    eos_fill, canvas_tokens = dataset.get("eos_fill"), dataset.get("canvas_tokens")
    if not eos_fill or canvas_tokens is None:
        return []
    return [
        f"dataset.eos_fill: {eos_fill} together with dataset.canvas_tokens: {canvas_tokens}; set eos_fill: 0 or "
        "canvas_tokens: null"
    ]


def micro_batch_holds_a_sequence(tokens_per_device: int, max_seq_len: int) -> list[str]:
    """A sequence is never split over micro-batches; the batch plan checks the real lengths again."""
    if tokens_per_device >= max_seq_len:
        return []
    return [
        f"tokens_per_device: {tokens_per_device} is less than max_seq_len {max_seq_len}, so a micro-batch could not "
        f"hold the longest sequence; raise it to at least {max_seq_len} or lower max_seq_len"
    ]


def fp32_compute_on_cpu(compute_dtype: str, device: str) -> list[str]:
    """On the CPU everything is computed in fp32."""
    if device != "cpu" or compute_dtype == "fp32":
        return []
    return [f"compute_dtype: {compute_dtype} with device: cpu, where only fp32 is offered; set compute_dtype: fp32"]


def checkpoint_dir_exists(checkpoint_dir: str | None) -> list[str]:
    """The directory to start from must be there; the models package reads what is in it."""
    if checkpoint_dir is None or Path(checkpoint_dir).is_dir():
        return []
    return [
        f"checkpoint_dir: {checkpoint_dir!r} is not a directory; download a checkpoint into it (the header of the "
        "config has the command), or set null to start from scratch"
    ]


def output_dir_is_no_file(output_dir: str) -> list[str]:
    """A run writes into a directory."""
    if not Path(output_dir).exists() or Path(output_dir).is_dir():
        return []
    return [f"output_dir: {output_dir!r} is a file; give a directory, which is made if it is missing"]


def resume_exists(resume: str) -> list[str]:
    """A training state to go on from must be there."""
    if resume in ("never", "auto") or Path(resume).exists():
        return []
    return [
        f"resume: {resume!r} is neither never nor auto nor an existing path; give the path of a saved training state, "
        "or auto for the newest one in output_dir"
    ]


def exported_target_exists(export: str | None, jepa_weight: float) -> list[str]:
    """Without a JEPA loss there is no target encoder to export."""
    if export not in ("target", "both") or jepa_weight > 0:
        return []
    return [f"export: {export}, but jepa_weight is 0, so there is no target encoder; set export: online or null"]


def a_sequence_for_every_rank(global_batch_size: int, launch: Launch) -> list[str]:
    """Every rank works on at least one sequence per step."""
    if global_batch_size >= launch.world_size:
        return []
    return [
        f"global_batch_size: {global_batch_size} is less than the {launch.world_size} ranks, which need a sequence "
        f"each; raise it to at least {launch.world_size}, or start fewer ranks (--nproc_per_node)"
    ]


def enough_gpus(device: str, launch: Launch) -> list[str]:
    """Every process on this machine has a GPU of its own."""
    if device != "cuda":
        return []
    if launch.num_gpus == 0:
        return [
            "device: cuda, but torch sees no CUDA GPU here; set device=cpu (computing in fp32), or look at "
            "nvidia-smi and CUDA_VISIBLE_DEVICES"
        ]
    if launch.local_world_size > launch.num_gpus:
        return [
            f"--nproc_per_node: {launch.local_world_size} processes, but this machine has {launch.num_gpus} GPUs, and "
            f"each process needs its own; start at most {launch.num_gpus}"
        ]
    return []


def replicas_divide_ranks(data_parallel_replicate_dim: int, launch: Launch) -> list[str]:
    """The mesh is replicate x shard, so replicas and ranks must divide."""
    if launch.world_size % data_parallel_replicate_dim == 0:
        return []
    return [
        f"data_parallel_replicate_dim: {data_parallel_replicate_dim} does not divide the {launch.world_size} ranks; "
        "set it to the number of machines, or 1 for plain sharding"
    ]


def bf16_average_in_one_process(target_encoder: Mapping[str, Any] | None, launch: Launch) -> list[str]:
    """Rounding is random, and differs between ranks; a sharded average in fp32 is small."""
    if launch.world_size == 1 or target_encoder is None or target_encoder.get("dtype", "fp32") == "fp32":
        return []
    return [
        f"target_encoder.dtype: {target_encoder['dtype']} on {launch.world_size} processes, where the average is "
        "sharded and kept in fp32; set target_encoder.dtype: fp32, or start one process"
    ]


def small_rate_on_bf16_weights(dtype: str, optimizer: Mapping[str, Any]) -> list[str]:
    """Warn when rounding will swallow most updates."""
    rate = optimizer.get("lr")
    if dtype != "bf16" or not isinstance(rate, float) or rate >= 1e-4 or optimizer.get("bf16_stochastic_round"):
        return []
    return [
        f"dtype: bf16 with optimizer.lr {rate}: round-to-nearest loses most of so small updates (against fp32 weights, "
        "bf16 AdamW makes 12 % of the way at lr 1e-5 and 3 % at 2e-6); set dtype: fp32 with compute_dtype: bf16, or on "
        "one GPU an optimizer of torchao with bf16_stochastic_round: true"
    ]
