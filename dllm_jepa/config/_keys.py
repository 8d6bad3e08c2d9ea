"""Every key of every recipe, declared once: type, range, default and one line of documentation.

In groups, from which the schemas of the recipes are put together.
"""

from dllm_jepa.config import _lora_rules as lora_rules
from dllm_jepa.config import _optimizer_rules as optimizer_rules
from dllm_jepa.config._kinds import ArgumentRange, Choice, Component, Flag, Key, Number, Section, Text

_COUNT = Number(integer=True, low=1)
_ONE_TO_FIVE = Number(integer=True, low=1, high=5)
_NOT_NEGATIVE = Number(low=0)
_NO_FP16 = (
    "fp16 overflows without loss scaling, which these recipes do not do; bf16 takes the same memory and has the "
    "range of fp32, so take bf16 or fp32"
)
FLOATS = Choice(("fp32", "bf16"), refused={"fp16": _NO_FP16, "float16": _NO_FP16, "half": _NO_FP16})


OUTPUT = (
    Key(
        "output_dir", Text("a path"), "folder that the run writes to; refused if it holds another run", may_change=True
    ),
    Key(
        "seed", Number(integer=True, low=0, high=2**32 - 1), "decides initial weights, data order and masks", default=0
    ),
    Key("device", Choice(("cpu", "cuda")), "where the model is", default="cuda", may_change=True),
)

TOKENIZER = (Key("tokenizer", Component(paths=("path",)), "builder of the tokenizer"),)

MODEL = (Key("model", Component(trial="meta", check=lora_rules.all_weights_trained), "builder of the backbone"),)

LORA_MODEL = (
    Key(
        "model",
        Component(trial="meta", check=lora_rules.adapters_on_a_frozen_base),
        "builder of the backbone with its adapters",
    ),
)

BASE = (
    Key(
        "checkpoint_dir",
        Text("a path"),
        "Hugging Face directory to start from; null = from scratch",
        default=None,
        nullable=True,
        may_change=True,
    ),
)

JEPA = (
    Key("jepa_weight", _NOT_NEGATIVE, "weight of the JEPA loss; 0 = plain diffusion, no target branch", default=1.0),
    Key("view_sampler", Component(trial="alone"), "draws the mask ratios of the context and target views"),
    Key(
        "predictor",
        Component(
            positional=("embed_dim", "mlp_dim"),
            ranges=(ArgumentRange("num_layers", _ONE_TO_FIVE, "dllm_jepa.jepa.transformer_predictor"),),
        ),
        "maps the pooled context embedding to the target's; needed unless jepa_weight is 0",
        default=None,
        nullable=True,
    ),
)

TARGET_ENCODER = (
    Key(
        "target_encoder",
        Component(
            positional=("backbone",),
            ranges=(ArgumentRange("ema_decay", Number(low=0, high=1, high_open=True)),),
        ),
        "embeds the target view; needed unless jepa_weight is 0",
        default=None,
        nullable=True,
    ),
)

LORA_TARGET_ENCODER = (
    Key(
        "target_encoder",
        Component(
            positional=("model",),
            ranges=(ArgumentRange("ema_decay", Number(low=0, high=1, high_open=True)),),
        ),
        "embeds the target view with averaged adapters; needed unless jepa_weight is 0",
        default=None,
        nullable=True,
    ),
)

JEPA_OPTIONS = (
    Key("jepa_every", _COUNT, "run the target branch on every n-th step only", default=1),
    Key(
        "jepa_ratio",
        Number(low=0, high=1, low_open=True),
        "run the target branch on this fraction of the steps; null = all",
        default=None,
        nullable=True,
    ),
    Key("shuffle_targets", Flag(), "control: compare each sequence with another one's target", default=False),
)

ANCHOR = (
    Key("l2_anchor_weight", _NOT_NEGATIVE, "weight of the squared distance to the initial weights; 0 = off", default=0),
)

POOLING = (
    Key("pooled_layer_norm", Flag(), "LayerNorm without affine parameters on pooled embeddings", default=True),
    Key(
        "monitor_every",
        Number(integer=True, low=0),
        "steps between collapse measurements; 0 = off",
        default=0,
        may_change=True,
    ),
)

DATA = (
    Key(
        "dataset",
        Component(
            keywords=("tokenizer", "max_seq_len", "shift_logits", "progress"),
            ranges=(
                ArgumentRange("eos_fill", Number(integer=True, low=0)),
                ArgumentRange("canvas_tokens", _COUNT),
                ArgumentRange("num_pairs", _COUNT),
            ),
            paths=("source", "tables"),
        ),
        "builder of the task: rows to tokens",
    ),
    Key("max_seq_len", Number(integer=True, low=4), "longest sequence, tokens"),
    Key("global_batch_size", _COUNT, "sequences per optimizer step, over all ranks"),
    Key(
        "tokens_per_device",
        _COUNT,
        "tokens per micro-batch and rank: the memory knob, does not change the loss",
        may_change=True,
    ),
    Key(
        "packed", Flag(), "pack sequences without padding; false = pad each micro-batch", default=True, may_change=True
    ),
)

LOSS = (
    Key(
        "loss_weight",
        Choice(("mean", "inverse_ratio", "token")),
        "diffusion loss: mean per sequence, LLaDA's 1/t, or mean over all masked tokens",
        default="mean",
    ),
    Key(
        "logits_chunk_tokens",
        _COUNT,
        "masked tokens scored at a time: bounds the memory of the logits, does not change the loss",
        default=1024,
        may_change=True,
    ),
)

OPTIMIZER = (
    Key(
        "optimizer",
        Component(positional=("params",), trial="optimizer", refusal=optimizer_rules.no_offloaded_optimizer),
        "builder of the optimizer",
    ),
    Key(
        "clip_grad_norm",
        Number(low=0, low_open=True),
        "largest gradient norm; null = no clipping",
        default=1.0,
        nullable=True,
    ),
)

SCHEDULE = (
    Key(
        "lr_scheduler",
        Component(
            positional=("optimizer",),
            optional=("num_training_steps",),
            trial="lr_scheduler",
        ),
        "builder of the schedule; null = constant rate",
        default=None,
        nullable=True,
    ),
)

OPTIMIZER_IN_BWD = (
    Key(
        "optimizer_in_bwd",
        Flag(),
        "step each parameter in the backward pass and free its gradient; one process, one micro-batch a step",
        default=False,
        may_change=True,
    ),
)

LENGTH = (
    Key("epochs", _COUNT, "passes over the data"),
    Key(
        "max_steps", _COUNT, "optimizer steps, whatever epochs says; null = as many as epochs give", None, nullable=True
    ),
)

DTYPE = (Key("dtype", FLOATS, "stored weights", default="fp32"),)

LORA_DTYPE = (
    Key(
        "dtype",
        Choice(
            ("fp32",),
            refused={"bf16": "adapters and predictor are small, and small steps are lost in bf16; set dtype: fp32"},
        ),
        "stored weights of adapters and predictor; the frozen base is stored in compute_dtype",
        default="fp32",
    ),
)

LOOP = (
    Key("compute_dtype", FLOATS, "matrix products; fp32 on the CPU", default="fp32"),
    Key("compile", Flag(), "torch.compile on every layer", default=False, may_change=True),
    Key(
        "enable_activation_checkpointing",
        Flag(),
        "recompute activations in the backward pass",
        default=False,
        may_change=True,
    ),
    Key(
        "data_parallel_replicate_dim",
        _COUNT,
        "copies of the sharded model; more than 1 = hybrid sharding",
        default=1,
        may_change=True,
    ),
)

CHECKPOINT = (
    Key(
        "checkpoint",
        Section(
            (
                Key(
                    "every_n_steps",
                    _COUNT,
                    "save the training state so often, and at the end; null = only when a signal stops the run",
                    None,
                    nullable=True,
                ),
                Key("keep_last", _COUNT, "newest training states to keep; null = all", None, nullable=True),
                Key("keep_every", _COUNT, "keep besides those at multiples of so many steps", None, nullable=True),
                Key("async_save", Flag(), "write from a copy in main memory while the run goes on", False),
                Key(
                    "directory", Text("a path"), "where they stand; null = output_dir/checkpoints", None, nullable=True
                ),
            )
        ),
        "the training state, for resuming",
        default={},
        may_change=True,
    ),
    Key(
        "resume",
        Text("never, auto or the path of a saved training state"),
        "what to go on from",
        default="never",
        may_change=True,
    ),
    Key(
        "resume_override",
        Flag(),
        "go on although keys that change the run have changed",
        default=False,
        may_change=True,
    ),
    Key(
        "export",
        Choice(("online", "target", "both")),
        "model to write at the end: trained weights to output_dir/hf, the target encoder's to hf_target; null = none",
        default="online",
        nullable=True,
        may_change=True,
    ),
    Key(
        "export_dtype",
        FLOATS,
        "type of the exported weights; null = compute_dtype",
        default=None,
        nullable=True,
        may_change=True,
    ),
)

LORA_EXPORT = (
    Key(
        "export_merged",
        Flag(),
        "besides the adapter in the PEFT layout, write the base with the adapter merged into it to output_dir/hf",
        default=False,
        may_change=True,
    ),
)

LOGGING = (
    Key(
        "metric_logger",
        Component(),
        "a logger beside output_dir/metrics.jsonl, which is always written; null = none",
        default=None,
        nullable=True,
        may_change=True,
    ),
    Key(
        "log_every_n_steps",
        _COUNT,
        "steps between reports: losses are read, checked and written so often; between them nothing waits for the GPU",
        default=1,
        may_change=True,
    ),
    Key(
        "peak_tflops",
        Number(low=0, low_open=True),
        "TFLOP/s of one GPU at its peak in compute_dtype, for mfu; null = it is not reported",
        default=None,
        nullable=True,
        may_change=True,
    ),
    Key(
        "profiler",
        Component(),
        "builder of a profiler, as torchtune.training.setup_torch_profiler; null = none",
        default=None,
        nullable=True,
        may_change=True,
    ),
)
