"""Rules across config keys, one small function each; see `Rule`.

Builders that are cheap to call are called here once, on tensors without memory, so that their own complaints
(ValueError) are among the problems that a config is told of; what they build is thrown away.
"""

import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dllm_jepa.config._component import Component
from dllm_jepa.config._config import Launch

# A schedule is built for so many steps when the yaml does not say: longer than any warm-up.
_MANY_STEPS = 10_000_000

_WHOLE_AVERAGE = "dllm_jepa.jepa.ema_target_encoder"
_ADAPTER_AVERAGE = "dllm_jepa.jepa.ema_adapter_target_encoder"
_OFFLOADED = ("torchao.optim.CPUOffloadOptimizer", "torchao.optim.cpu_offload.CPUOffloadOptimizer")


# Builders


def model_builds(model: Component) -> Iterator[str]:
    """The model has to be one that can be trained."""
    try:
        trained = _trained(model)
    except (ValueError, ArithmeticError, RuntimeError) as error:  # the last two: torch, for impossible sizes
        yield f"model: {error}"
        return
    if not any(trained):
        yield f"model: {model.path} builds a model without a weight to train"


def optimizer_builds(optimizer: Component) -> Iterator[str]:
    """The optimizer has to take its arguments."""
    if optimizer.path in _OFFLOADED:
        yield (
            f"optimizer._component_: {optimizer.path} is not offered: it keeps its own copy of the weights in main "
            "memory, with which it would overwrite the loaded ones of a resumed run, it has no state by parameter to "
            "save, and it takes the gradients before they are clipped; take torchao.optim.AdamW8bit with "
            "optimizer_in_bwd: true"
        )
    else:
        yield from _complaint("optimizer", lambda: _optimizer(optimizer))


def lr_scheduler_builds(optimizer: Component, lr_scheduler: Component | None) -> Iterator[str]:
    """The schedule has to take its arguments, over the config's own optimizer."""
    if lr_scheduler is None or any(optimizer_builds(optimizer)):
        return
    steps = {} if "num_training_steps" in lr_scheduler.arguments else {"num_training_steps": _MANY_STEPS}
    if steps and not lr_scheduler.takes("num_training_steps"):
        yield (
            f"lr_scheduler._component_: {lr_scheduler.path} does not take 'num_training_steps', which the recipe passes"
        )
    else:
        yield from _complaint("lr_scheduler", lambda: lr_scheduler.build(_optimizer(optimizer), **steps))


def view_sampler_builds(view_sampler: Component) -> Iterator[str]:
    """The view sampler has to take its arguments."""
    yield from _complaint("view_sampler", view_sampler.build)


def decoding_builds(decoding: Component | None) -> Iterator[str]:
    """The decoding has to take its arguments."""
    if decoding is not None:
        yield from _complaint("decoding", decoding.build)


# Data and batches


def one_fill(dataset: Component) -> Iterator[str]:
    """A response is filled by a number of tokens or up to a number of tokens, not both."""
    eos_fill, canvas_tokens = dataset.arguments.get("eos_fill"), dataset.arguments.get("canvas_tokens")
    if eos_fill and canvas_tokens is not None:
        yield (
            f"dataset.eos_fill: {eos_fill} together with dataset.canvas_tokens: {canvas_tokens}; set eos_fill: 0 or "
            "canvas_tokens: null"
        )


def micro_batch_holds_a_sequence(tokens_per_device: int, max_seq_len: int) -> Iterator[str]:
    """A sequence is never split over micro-batches; the batch plan checks the real lengths again."""
    if tokens_per_device < max_seq_len:
        yield (
            f"tokens_per_device: {tokens_per_device} is less than max_seq_len {max_seq_len}, so a micro-batch could "
            f"not hold the longest sequence; raise it to at least {max_seq_len} or lower max_seq_len"
        )


def a_sequence_for_every_rank(global_batch_size: int, launch: Launch) -> Iterator[str]:
    """Every rank works on at least one sequence per step."""
    if global_batch_size < launch.world_size:
        yield (
            f"global_batch_size: {global_batch_size} is less than the {launch.world_size} ranks, which need a sequence "
            f"each; raise it to at least {launch.world_size}, or start fewer ranks (--nproc_per_node)"
        )


# Files and folders


def checkpoint_dir_exists(checkpoint_dir: str | None) -> Iterator[str]:
    """The directory to start from must be there; the models package reads what is in it."""
    if checkpoint_dir is not None and not Path(checkpoint_dir).is_dir():
        yield (
            f"checkpoint_dir: {checkpoint_dir!r} is not a directory; download a checkpoint into it (the header of the "
            "config has the command), or set null to start from scratch"
        )


def model_directory_exists(checkpoint_dir: str) -> Iterator[str]:
    """The model must be there."""
    yield from _directory_problems("checkpoint_dir", checkpoint_dir)


def base_directory_exists(base_dir: str | None) -> Iterator[str]:
    """The model to compare with must be there."""
    if base_dir is not None:
        yield from _directory_problems("base_dir", base_dir)


def output_dir_can_be_written(output_dir: str) -> Iterator[str]:
    """A run writes into a directory, which is made if it is missing."""
    path = Path(output_dir).absolute()
    if path.exists() and not path.is_dir():
        yield f"output_dir: {output_dir!r} is a file; give a directory, which is made if it is missing"
        return
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not nearest.is_dir():
        yield f"output_dir: {output_dir!r} given, but {str(nearest)!r} is a file; choose another folder"
    elif not os.access(nearest, os.W_OK):
        yield f"output_dir: {output_dir!r} given, but {str(nearest)!r} cannot be written to; choose another folder"


def resume_exists(resume: str) -> Iterator[str]:
    """A training state to go on from must be there."""
    if resume not in ("never", "auto") and not Path(resume).exists():
        yield (
            f"resume: {resume!r} is neither never nor auto nor an existing path; give the path of a saved training "
            "state, or auto for the newest one in output_dir"
        )


# The machine


def fp32_compute_on_cpu(compute_dtype: str, device: str) -> Iterator[str]:
    """On the CPU everything is computed in fp32."""
    if device == "cpu" and compute_dtype != "fp32":
        yield f"compute_dtype: {compute_dtype} with device: cpu, where only fp32 is offered; set compute_dtype: fp32"


def enough_gpus(device: str, launch: Launch) -> Iterator[str]:
    """Every process on this machine has a GPU of its own."""
    if device != "cuda":
        return
    if launch.num_gpus == 0:
        yield (
            "device: cuda, but torch sees no CUDA GPU here; set device=cpu (computing in fp32), or look at "
            "nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    elif launch.local_world_size > launch.num_gpus:
        yield (
            f"--nproc_per_node: {launch.local_world_size} processes, but this machine has {launch.num_gpus} GPUs, and "
            f"each process needs its own; start at most {launch.num_gpus}"
        )


def replicas_divide_ranks(data_parallel_replicate_dim: int, launch: Launch) -> Iterator[str]:
    """The mesh is replicate x shard, so replicas and ranks must divide."""
    if launch.world_size % data_parallel_replicate_dim:
        yield (
            f"data_parallel_replicate_dim: {data_parallel_replicate_dim} does not divide the {launch.world_size} ranks;"
            " set it to the number of machines, or 1 for plain sharding"
        )


# The optimizer


def low_bit_optimizer_on_sharded_bf16(optimizer: Component, dtype: str, launch: Launch) -> Iterator[str]:
    """Sharded bf16 weights and a state of few bits cannot be resumed."""
    if _is_low_bit(optimizer) and dtype == "bf16" and launch.world_size > 1:
        yield (
            f"optimizer._component_: {optimizer.path} with dtype: bf16 on {launch.world_size} processes: its state "
            "cannot be loaded again for sharded bf16 weights; set dtype: fp32 with compute_dtype: bf16, or start one "
            "process"
        )


def stochastic_round_in_one_process(optimizer: Component, launch: Launch) -> Iterator[str]:
    """The rounding of torchao mixes plain tensors with sharded ones, which torch refuses."""
    if optimizer.arguments.get("bf16_stochastic_round") and launch.world_size > 1:
        yield (
            f"optimizer.bf16_stochastic_round: true on {launch.world_size} processes: torchao cannot round sharded "
            "weights stochastically; set it to false and dtype: fp32 with compute_dtype: bf16, or start one process"
        )


def stochastic_round_needs_bf16(optimizer: Component, dtype: str) -> Iterator[str]:
    """Weights in fp32 are not rounded."""
    if optimizer.arguments.get("bf16_stochastic_round") and dtype != "bf16":
        yield (
            f"optimizer.bf16_stochastic_round: true has no effect with dtype: {dtype}, as only bf16 weights are "
            "rounded; set it to false, or dtype: bf16"
        )


def low_bit_optimizer_has_compiler(optimizer: Component, launch: Launch) -> Iterator[str]:
    """Torchao's optimizers compile their step, on a GPU, too; it takes the compiler that torch's inductor looks for."""
    del launch  # a check of this machine, not of the config
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if _is_low_bit(optimizer) and not shutil.which(compiler) and not os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):
        yield (
            f"optimizer._component_: {optimizer.path} compiles its step and needs a C++ compiler, but there is no "
            f"{compiler!r} here; install g++ (apt-get install g++), set the environment variable CXX to another "
            "compiler, or take torch.optim.AdamW"
        )


def optimizer_in_bwd_is_legal(optimizer_in_bwd: bool, clip_grad_norm: float | None) -> Iterator[str]:
    """Within the backward pass nothing can come between a gradient and its update."""
    if optimizer_in_bwd and clip_grad_norm is not None:
        yield (
            f"optimizer_in_bwd: true together with clip_grad_norm: {clip_grad_norm}, but the norm is known only after "
            "the last gradient, when the weights are updated; set clip_grad_norm: null or optimizer_in_bwd: false"
        )


def optimizer_in_bwd_in_one_process(optimizer_in_bwd: bool, launch: Launch) -> Iterator[str]:
    """FSDP counts on the gradients of a layer to live until the end of the backward pass."""
    if optimizer_in_bwd and launch.world_size > 1:
        yield (
            f"optimizer_in_bwd: true on {launch.world_size} processes, but FSDP reduces gradients on streams of its "
            "own and counts on them to live until the end of the backward pass; set optimizer_in_bwd: false (a process "
            "holds only its shard of the gradients), or start one process"
        )


def small_rate_on_bf16_weights(dtype: str, optimizer: Component) -> Iterator[str]:
    """Warn when rounding will swallow most updates."""
    rate = optimizer.arguments.get("lr")
    if dtype != "bf16" or not isinstance(rate, float) or rate >= 1e-4:
        return
    if not optimizer.arguments.get("bf16_stochastic_round"):
        yield (
            f"dtype: bf16 with optimizer.lr {rate}: round-to-nearest loses most of so small updates (against fp32 "
            "weights, bf16 AdamW makes 12 % of the way at lr 1e-5 and 3 % at 2e-6); set dtype: fp32 with "
            "compute_dtype: bf16, or on one GPU an optimizer of torchao with bf16_stochastic_round: true"
        )


def warmup_within_the_run(lr_scheduler: Component | None, max_steps: int | None) -> Iterator[str]:
    """Warn of a warm-up that never ends."""
    warmup = None if lr_scheduler is None else lr_scheduler.arguments.get("num_warmup_steps")
    if isinstance(warmup, int) and max_steps is not None and warmup >= max_steps:
        yield (
            f"lr_scheduler.num_warmup_steps: {warmup} with max_steps: {max_steps}: the learning rate rises to the end; "
            "lower the warm-up, or raise max_steps"
        )


# Adapters


def adapters_in_fp32(model: Component, dtype: str) -> Iterator[str]:
    """Adapters are small, and so are their updates."""
    if dtype != "fp32" and has_adapters(model):
        yield (
            f"dtype: {dtype} with adapters (LoRA): adapters and predictor are small, and small steps are lost in "
            f"{dtype}; set dtype: fp32. The frozen base is stored in compute_dtype"
        )


def dora_on_several_processes(model: Component, compute_dtype: str, launch: Launch) -> Iterator[str]:
    """FSDP gathers every parameter in the compute type, and of a quantized weight never the whole, which DoRA needs."""
    if launch.world_size == 1 or not model.argument("use_dora"):
        return
    if compute_dtype != "fp32":
        yield (
            f"model.use_dora: true with compute_dtype: {compute_dtype} on {launch.world_size} processes, where "
            "magnitudes would be used in bf16, which loses their small steps; set use_dora: false or compute_dtype: "
            "fp32, or start one process"
        )

    if model.argument("quantize_base"):
        yield (
            f"model.use_dora: true with quantize_base: true on {launch.world_size} processes, which FSDP2 cannot "
            "shard; set use_dora: false or quantize_base: false, or start one process"
        )


def optimizer_in_bwd_trains_everything(model: Component, optimizer_in_bwd: bool) -> Iterator[str]:
    """Of adapters there are no gradients to save."""
    if optimizer_in_bwd and has_adapters(model):
        yield (
            "optimizer_in_bwd: true with adapters (LoRA), whose gradients take megabytes; set optimizer_in_bwd: false"
        )


def merged_with_an_export(model: Component, export_merged: bool, export: str | None) -> Iterator[str]:
    """What is merged is what is exported."""
    if not export_merged:
        return
    if export is None:
        yield "export_merged: true, but export is null: there is nothing to merge; set export: online, target or both"
    if has_adapters(model) is False:
        yield "export_merged: true, but all weights are trained: there is no adapter to merge; set export_merged: false"


# The method


def jepa_parts_present(jepa_weight: float, predictor: object, target_encoder: object) -> Iterator[str]:
    """With a JEPA loss there must be something to compute it with."""
    for name, part in {"predictor": predictor, "target_encoder": target_encoder}.items():
        if jepa_weight > 0 and part is None:
            yield f"{name}: null, but jepa_weight is {jepa_weight}; give {name}._component_, or set jepa_weight: 0"


def one_jepa_schedule(jepa_every: int, jepa_ratio: float | None) -> Iterator[str]:
    """Two ways of thinning out the target branch exclude each other."""
    if jepa_every != 1 and jepa_ratio is not None:
        yield (
            f"jepa_every: {jepa_every} together with jepa_ratio: {jepa_ratio}; set jepa_every: 1 or jepa_ratio: null"
        )


def shuffling_has_targets(shuffle_targets: bool, jepa_weight: float, global_batch_size: int) -> Iterator[str]:
    """A permutation of targets without a fixed point needs targets, and two of them."""
    if shuffle_targets and jepa_weight == 0:
        yield (
            "shuffle_targets: true, but jepa_weight is 0, so there are no targets; set shuffle_targets: false or "
            "jepa_weight > 0"
        )
    if shuffle_targets and global_batch_size < 2:
        yield (
            f"shuffle_targets: true needs two sequences to exchange targets, but global_batch_size is "
            f"{global_batch_size}; set it to 2 or more"
        )


def exported_target_exists(export: str | None, jepa_weight: float) -> Iterator[str]:
    """Without a JEPA loss there is no target encoder to export."""
    if export in ("target", "both") and jepa_weight == 0:
        yield f"export: {export}, but jepa_weight is 0, so there is no target encoder; set export: online or null"


def average_of_what_is_trained(model: Component, target_encoder: Component | None) -> Iterator[str]:
    """Under LoRA the base is shared and only adapters have an average; else the whole backbone has one."""
    adapters = has_adapters(model)
    if target_encoder is None or adapters is None:
        return
    if adapters:
        wrong, right, reason = _WHOLE_AVERAGE, _ADAPTER_AVERAGE, "only adapters are trained"
    else:
        wrong, right, reason = _ADAPTER_AVERAGE, _WHOLE_AVERAGE, "all weights are trained"
    if target_encoder.path == wrong:
        yield f"target_encoder._component_: {wrong}, but {reason}; take {right}"


def bf16_average_in_one_process(target_encoder: Component | None, launch: Launch) -> Iterator[str]:
    """Rounding is random, and differs between ranks; a sharded average in fp32 is small."""
    if launch.world_size > 1 and target_encoder is not None and target_encoder.argument("dtype") == "bf16":
        yield (
            f"target_encoder.dtype: bf16 on {launch.world_size} processes, where the average is sharded and kept in "
            "fp32; set target_encoder.dtype: fp32, or start one process"
        )


def anchor_with_whole_gradients(model: Component, l2_anchor_weight: float, optimizer_in_bwd: bool) -> Iterator[str]:
    """The anchor pulls the weights of the base, and its gradient is added after the backward pass."""
    if l2_anchor_weight == 0:
        return
    if optimizer_in_bwd:
        yield (
            f"optimizer_in_bwd: true together with l2_anchor_weight: {l2_anchor_weight}, but the anchor's gradient is "
            "added after the backward pass, when the weights are updated; set l2_anchor_weight: 0 or "
            "optimizer_in_bwd: false"
        )
    if has_adapters(model):
        yield (
            f"l2_anchor_weight: {l2_anchor_weight} with adapters (LoRA), but the anchor pulls the weights of the base, "
            "which are frozen; set l2_anchor_weight: 0"
        )


def float8_on_gpu_in_bf16(target_encoder: Component | None, device: str, compute_dtype: str) -> Iterator[str]:
    """The CPU has no products of float8, and results of rowwise ones are bf16."""
    if not _is_float8(target_encoder):
        return
    if device == "cpu":
        yield (
            "target_encoder.float8: true with device: cpu, but it needs a GPU of compute capability 8.9 or more (Ada, "
            "Hopper and later); set target_encoder.float8: false"
        )
    elif compute_dtype != "bf16":
        yield (
            f"target_encoder.float8: true with compute_dtype: {compute_dtype}, but products of float8 give bf16; set "
            "compute_dtype: bf16 or target_encoder.float8: false"
        )


def float8_capability(target_encoder: Component | None, device: str, launch: Launch) -> Iterator[str]:
    """An older GPU has no products of float8."""
    if not _is_float8(target_encoder) or device != "cuda" or launch.num_gpus == 0:
        return
    import torch

    # This starts CUDA in the process.
    major, minor = min(map(torch.cuda.get_device_capability, range(launch.num_gpus)))
    if (major, minor) < (8, 9):
        yield (
            f"target_encoder.float8: true on a GPU of compute capability {major}.{minor}, but it needs 8.9 or more "
            "(Ada, Hopper and later); set target_encoder.float8: false"
        )


def float8_without_compile(target_encoder: Component | None, compile: bool) -> Iterator[str]:
    """Warn when scaling and rounding will cost what the products save."""
    if _is_float8(target_encoder) and not compile:
        yield (
            "target_encoder.float8: true with compile: false: without fused kernels, scaling and rounding of inputs "
            "and weights can take longer than float8 products save; set compile: true"
        )


# Evaluation and generation


def task_gets_what_it_takes(task: Component, decoding: Component | None, num_shots: int | None) -> Iterator[str]:
    """A task that generates needs a decoding; one that does not must not be given one, nor shots that it has not."""
    parameters = task.parameters
    if not parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    if decoding is None and task.takes("decoding"):
        yield (f"decoding: null given, but {task.path} generates; give one such as dllm_jepa.generation.llada_decoding")
    if decoding is not None and not task.takes("decoding"):
        yield f"decoding: {task.path} generates nothing; set decoding: null (decoding=null on the command line)"
    if num_shots is not None and not task.takes("num_shots"):
        yield f"num_shots: {num_shots} given, but {task.path} has no shots; set num_shots: null"


def one_source_of_prompts(prompt: str | None, prompts_file: str | None) -> Iterator[str]:
    """Prompts come from one place, which must exist; stdin is left alone where there is a prompt."""
    if prompt is None and prompts_file is None:
        yield "prompt, prompts_file: neither given, must be one of them; prompts_file=- reads prompts from stdin"
    elif prompt is not None and prompts_file not in (None, "-"):
        yield f"prompt, prompts_file: both given, must be one of them; leave out prompts_file={prompts_file}"
    elif prompts_file not in (None, "-") and not Path(prompts_file).is_file():
        yield f"prompts_file: {prompts_file!r} is not a file (looked for {Path(prompts_file).absolute()})"


def new_files(html: str | None, output: str | None) -> Iterator[str]:
    """Files to write have the right ending, a folder to be in, and are not there yet."""
    for key, value, suffix in (("html", html, ".html"), ("output", output, ".jsonl")):
        if value is None:
            continue
        path = Path(value)
        if path.suffix != suffix:
            yield f"{key}: {value!r} given, must end in {suffix}"
        elif path.exists():
            yield f"{key}: {value!r} exists and is kept; choose another name or remove it"
        elif not path.absolute().parent.is_dir():
            yield f"{key}: {value!r} given, but the folder {str(path.parent)!r} does not exist; make it"
        elif not os.access(path.absolute().parent, os.W_OK):
            yield f"{key}: {value!r} given, but the folder {str(path.parent)!r} cannot be written to"


def one_process(launch: Launch) -> Iterator[str]:
    """What is shown in a terminal comes from one process."""
    if launch.world_size > 1:
        yield f"--nproc_per_node: {launch.world_size} processes, but this recipe runs in one; leave it out"


def has_adapters(model: Component) -> bool | None:
    """Whether a model trains adapters on a frozen base; None for one that cannot be built, a problem of its own."""
    try:
        trained = _trained(model)
    except (ValueError, ArithmeticError, RuntimeError):
        return None
    return any(trained) and not all(trained)


@functools.lru_cache(maxsize=4)
def _trained(model: Component) -> tuple[bool, ...]:
    """Whether each parameter of a model is trained."""
    import torch  # seconds to import; `dllm-jepa ls` must not pay for it

    with torch.device("meta"):
        built = model.build()
    return tuple(param.requires_grad for param in built.parameters()) if hasattr(built, "parameters") else (True,)


def _optimizer(optimizer: Component) -> Any:
    import torch

    return optimizer.build([torch.nn.Parameter(torch.zeros(1))])


def _complaint(key: str, build: Callable[[], object]) -> Iterator[str]:
    try:
        build()
    except (ValueError, ArithmeticError, RuntimeError) as error:  # the last two: torch, for impossible sizes
        yield f"{key}: {error}"


def _directory_problems(key: str, value: str) -> Iterator[str]:
    if not Path(value).is_dir():
        yield f"{key}: {value!r} is not a directory (looked for {Path(value).absolute()})"


def _is_low_bit(optimizer: Component) -> bool:
    """Whether it is an optimizer of torchao with a step of its own."""
    return optimizer.path.startswith("torchao.optim.") and optimizer.path not in _OFFLOADED


def _is_float8(target_encoder: Component | None) -> bool:
    return target_encoder is not None and target_encoder.arguments.get("float8") is True
