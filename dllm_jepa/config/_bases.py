"""The keys that recipes of one kind share; a recipe's own `Config` adds the keys of its method.

Configs of training: how a run is read, fed, optimized, saved and logged. Configs that use a trained model: which one.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dllm_jepa.config import _rules
from dllm_jepa.config._component import Component, Given
from dllm_jepa.config._config import Config, Dtype, MayChange, PathText, Rule, Section, Text
from dllm_jepa.config._describe import Phrase

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Device = Literal["cpu", "cuda"]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]


class Checkpoint(Section):
    """The training state, for resuming."""

    every_n_steps: Annotated[
        Count | None,
        Field(
            description="save the training state so often, and at the end; null = only when a signal stops the run or "
            "its export fails"
        ),
    ] = None
    keep_last: Annotated[Count | None, Field(description="newest training states to keep; null = all")] = None
    keep_every: Annotated[Count | None, Field(description="keep besides those at multiples of so many steps")] = None
    async_save: Annotated[bool, Field(description="write from a copy in main memory while the run goes on")] = False
    directory: Annotated[PathText | None, Field(description="where they stand; null = output_dir/checkpoints")] = None


class Training(Config):
    """The keys of a recipe that trains, but for those of its method."""

    output_dir: Annotated[
        PathText, MayChange, Field(description="folder that the run writes to; refused if it holds another run")
    ]
    seed: Annotated[Seed, Field(description="decides initial weights, data order and masks")] = 0
    device: Annotated[Device, MayChange, Field(description="where the model is")] = "cuda"
    tokenizer: Annotated[Component, Given(paths=("path",)), Field(description="builder of the tokenizer")]
    model: Annotated[
        Component, Given(), Field(description="builder of the backbone: all weights are trained, or adapters (LoRA)")
    ]
    checkpoint_dir: Annotated[
        PathText | None, MayChange, Field(description="Hugging Face directory to start from; null = from scratch")
    ] = None
    dataset: Annotated[
        Component,
        Given(
            keywords=("tokenizer", "max_seq_len", "shift_logits", "progress"),
            offered=("max_rows",),
            paths=("source", "tables"),
        ),
        Field(description="builder of the task: rows to tokens"),
    ]
    max_seq_len: Annotated[int, Field(ge=4, description="longest sequence, tokens")]
    global_batch_size: Annotated[Count, Field(description="sequences per optimizer step, over all ranks")]
    tokens_per_device: Annotated[
        Count,
        MayChange,
        Field(description="tokens per micro-batch and rank: the memory knob, does not change the loss"),
    ]
    packed: Annotated[
        bool, MayChange, Field(description="pack sequences without padding; false = pad each micro-batch")
    ] = True
    optimizer: Annotated[Component, Given(positional=("params",)), Field(description="builder of the optimizer")]
    clip_grad_norm: Annotated[Rate | None, Field(description="largest gradient norm; null = no clipping")] = 1.0
    optimizer_in_bwd: Annotated[
        bool,
        MayChange,
        Field(
            description="step each parameter in the backward pass and free its gradient; one process, one micro-batch "
            "a step"
        ),
    ] = False
    lr_scheduler: Annotated[
        Annotated[Component, Given(positional=("optimizer",), offered=("num_training_steps",))] | None,
        Field(description="builder of the schedule; null = constant rate"),
    ] = None
    epochs: Annotated[Count, Field(description="passes over the data")]
    max_steps: Annotated[
        Count | None, Field(description="optimizer steps, whatever epochs says; null = as many as epochs give")
    ] = None
    dtype: Annotated[
        Dtype, Field(description="stored weights; of LoRA those of adapters and predictor, always fp32")
    ] = "fp32"
    compute_dtype: Annotated[
        Dtype, Field(description="matrix products, and the stored weights of a frozen base; fp32 on the CPU")
    ] = "fp32"
    compile: Annotated[bool, MayChange, Field(description="torch.compile on every layer")] = False
    enable_activation_checkpointing: Annotated[
        bool, MayChange, Field(description="recompute activations in the backward pass")
    ] = False
    data_parallel_replicate_dim: Annotated[
        Count, MayChange, Field(description="copies of the sharded model; more than 1 = hybrid sharding")
    ] = 1
    checkpoint: Annotated[
        Checkpoint, MayChange, Field(description="the training state, for resuming", default_factory=Checkpoint)
    ]
    resume: Annotated[
        Text,
        Phrase("never, auto or the path of a saved training state"),
        MayChange,
        Field(description="what to go on from"),
    ] = "never"
    resume_override: Annotated[
        bool, MayChange, Field(description="go on although keys that change the run have changed")
    ] = False
    export_dtype: Annotated[
        Dtype | None, MayChange, Field(description="type of the exported weights; null = compute_dtype")
    ] = None
    metric_logger: Annotated[
        Component | None,
        MayChange,
        Field(description="a logger beside output_dir/metrics.jsonl, which is always written; null = none"),
    ] = None
    log_every_n_steps: Annotated[
        Count,
        MayChange,
        Field(
            description="steps between reports: losses are read, checked and written so often; between them nothing "
            "waits for the GPU"
        ),
    ] = 1
    peak_tflops: Annotated[
        Rate | None,
        MayChange,
        Field(description="TFLOP/s of one GPU at its peak in compute_dtype, for mfu; null = it is not reported"),
    ] = None
    profiler: Annotated[
        Component | None,
        MayChange,
        Field(description="builder of a profiler, as torchtune.training.setup_torch_profiler; null = none"),
    ] = None

    rules: ClassVar[tuple[Rule, ...]] = (
        _rules.model_builds,
        _rules.optimizer_builds,
        _rules.lr_scheduler_builds,
        _rules.one_fill,
        _rules.micro_batch_holds_a_sequence,
        _rules.a_sequence_for_every_rank,
        _rules.checkpoint_dir_exists,
        _rules.output_dir_can_be_written,
        _rules.resume_exists,
        _rules.fp32_compute_on_cpu,
        _rules.enough_gpus,
        _rules.replicas_divide_ranks,
        _rules.low_bit_optimizer_on_sharded_bf16,
        _rules.stochastic_round_in_one_process,
        _rules.stochastic_round_needs_bf16,
        _rules.low_bit_optimizer_has_compiler,
        _rules.optimizer_in_bwd_is_legal,
        _rules.optimizer_in_bwd_in_one_process,
        _rules.optimizer_in_bwd_trains_everything,
        _rules.adapters_in_fp32,
        _rules.dora_on_several_processes,
    )
    remarks: ClassVar[tuple[Rule, ...]] = (_rules.small_rate_on_bf16_weights, _rules.warmup_within_the_run)


class TrainedModel(Config):
    """The keys of a recipe that uses a trained model."""

    seed: Annotated[Seed, Field(description="decides every random number")] = 0
    device: Annotated[Device, MayChange, Field(description="where the model is")] = "cuda"
    checkpoint_dir: Annotated[
        PathText,
        MayChange,
        Field(
            description="the model: a Hugging Face directory, an adapter, a run, or a training state "
            "(runs/x/checkpoints/step_00000100)"
        ),
    ]
    adapter_base: Annotated[
        PathText | None,
        MayChange,
        Field(description="of an adapter: its base, if it is not where the adapter says; null = where it says"),
    ] = None
    part: Annotated[
        Literal["online", "target"],
        Field(
            description="of a training state: the trained weights, or those of the target encoder with the trained head"
        ),
    ] = "online"
    tokenizer: Annotated[
        Annotated[Component, Given(offered=("path",))] | None,
        MayChange,
        Field(description="builder of the tokenizer; null = the checkpoint's own"),
    ] = None
    dtype: Annotated[Dtype, Field(description="weights and computation")] = "fp32"
    batch_size: Annotated[Count, Field(description="rows in one forward pass: the memory knob")] = 16

    rules: ClassVar[tuple[Rule, ...]] = (_rules.model_directory_exists, _rules.enough_gpus)
