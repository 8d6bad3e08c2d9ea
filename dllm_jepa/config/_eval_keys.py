"""The keys of the recipes that use a trained model: evaluation and generation."""

from dllm_jepa.config._keys import FLOATS
from dllm_jepa.config._kinds import Choice, Component, Flag, Key, Number, Text

_COUNT = Number(integer=True, low=1)

OUTPUT = (
    Key("output_dir", Text("a path"), "folder for results; refused if it holds another evaluation"),
    Key(
        "resume",
        Choice(("never", "auto")),
        "auto goes on where an evaluation stopped: finished items are not done again",
        default="never",
    ),
)

RUN = (
    Key("seed", Number(integer=True, low=0, high=2**32 - 1), "decides every random number", default=0),
    Key("device", Choice(("cpu", "cuda")), "where the model is", default="cuda"),
)

MODEL = (
    Key(
        "checkpoint_dir",
        Text("a path"),
        "the model: a Hugging Face directory, an adapter, or a training state (runs/x/checkpoints/step_00000100)",
    ),
    Key(
        "part",
        Choice(("online", "target")),
        "of a training state: the trained weights, or those of the target encoder with the trained head",
        default="online",
    ),
    Key(
        "tokenizer",
        Component(positional=("path",)),
        "builder of the tokenizer; null = the checkpoint's own",
        default=None,
        nullable=True,
    ),
    Key("dtype", FLOATS, "weights and computation", default="fp32"),
)

BASE = (
    Key(
        "base_dir",
        Text("a path"),
        "a second model, evaluated on the same items for the paired difference; null = none",
        default=None,
        nullable=True,
    ),
)

TASK = (
    Key(
        "task",
        Component(
            positional=("tokenizer",),
            keywords=("seed", "max_items", "progress"),
            offered=("decoding", "num_shots"),
        ),
        "builder of the task: items, prompts, scores",
    ),
    Key(
        "num_shots",
        Number(integer=True, low=0),
        "solved examples in front of each question; null = the task has none",
        default=None,
        nullable=True,
    ),
    Key("max_items", _COUNT, "evaluate only the first so many; null = all", default=None, nullable=True),
)

DECODING = (
    Key(
        "decoding",
        Component(trial="alone"),
        "how responses are generated; null for tasks that only measure likelihoods",
        default=None,
        nullable=True,
    ),
)

GENERATION_DECODING = (Key("decoding", Component(trial="alone"), "how responses are generated"),)

BATCH = (Key("batch_size", _COUNT, "rows in one forward pass: the memory knob", default=16),)

PROMPTS = (
    Key("prompt", Text(verbatim=True), "one prompt; null = those of prompts_file", default=None, nullable=True),
    Key(
        "prompts_file",
        Text("a path, or - for stdin", verbatim=True),
        "a text file with a prompt per line, or a .jsonl file with the field `prompt`; a prompt keeps stdin unread",
        default=None,
        nullable=True,
    ),
    Key("template", Choice(("chat", "plain")), "chat format of the tokenizer, or plain text", default="chat"),
    Key("system_prompt", Text(verbatim=True), "system prompt; null = none", default=None, nullable=True),
)

SHOW = (
    Key("show_steps", Flag(), "show in the terminal how the tokens are filled in", default=True),
    Key(
        "html",
        Text("a path ending in .html"),
        "write a page on which the denoising can be stepped through; null = none",
        default=None,
        nullable=True,
    ),
    Key(
        "output",
        Text("a path ending in .jsonl"),
        "write prompts and responses, one object per line; null = none",
        default=None,
        nullable=True,
    ),
)
