"""The README.md of an exported model: what it is, what it was made from, and how it did."""

import json
from collections.abc import Mapping
from typing import Any

_PARTS = {
    "online": "The trained weights.",
    "target": "The weights of the EMA target encoder: a slow average of the trained ones. Its head is the trained one.",
}
_SHOWN = ("loss", "diffusion_loss", "jepa_loss", "grad_norm", "effective_rank")


def model_card(part: str, state: Mapping[str, Any], config_yaml: str) -> str:
    """Write the card.

    Args:
        part: "online" or "target".
        state: what a checkpoint says of its run: `step`, `metrics` (the last row of metrics.jsonl), `base` (what it
            started from, or None), `model`, `data`, `seed` and `versions`.
        config_yaml: the resolved config.
    """
    base, family, step, data = state["base"], state["model"]["family"], state["step"], state["data"]
    metrics: Mapping[str, Any] = state["metrics"]
    losses = "\n".join(f"| `{name}` | {metrics[name]:.6g} |" for name in _SHOWN if name in metrics)
    versions = ", ".join(f"{name} {version}" for name, version in state["versions"].items())
    lora, about = state["model"].get("lora"), _PARTS[part]
    if lora is not None:
        kind = f"{'Q' * lora['quantize_base']}{'DoRA' if lora['use_dora'] else 'LoRA'}"
        about += (
            f" {kind} of rank {lora['rank']}: with `adapter_config.json` beside this page it is the adapter alone, for "
            "`peft.PeftModel.from_pretrained` on its base or `dllm_jepa.models.load_adapter`; without, the base with "
            "the adapter merged into it."
        )
        made_from = f"LoRA on {'random weights' if base is None else f'`{base}`'}"
    else:
        made_from = "trained from scratch" if base is None else f"fine-tuned from `{base}`"
    base_model = [] if base is None else [f"base_model: {json.dumps(base)}"]
    front = "\n".join(["---", *base_model, "library_name: dllm-jepa", f"tags: [masked-diffusion, {family}]", "---"])
    return f"""{front}

# A {family} model, {made_from}

{about} Made by [DLLM-JEPA](https://arxiv.org/abs/2606.00091) fine-tuning, {step:,} optimizer steps.

- **Data**: {data["source"]}, {data["sequences"]:,} sequences (sha256 of their tokens: `{data["sha256"]}`)
- **Seed**: {state["seed"]}
- **Made with**: {versions}

Last step of training, on its global batch:

| | |
|---|---|
{losses}

## Config

```yaml
{config_yaml.strip()}
```
"""
