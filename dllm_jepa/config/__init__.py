"""Configs: where they are, what may stand in them, and checking all of it at once before anything is loaded."""

from dllm_jepa.config import _rules as rules
from dllm_jepa.config._bases import Checkpoint, Count, Rate, TrainedModel, Training
from dllm_jepa.config._component import Component, Given, locate
from dllm_jepa.config._config import (
    Config,
    Dtype,
    Launch,
    MayChange,
    PathText,
    Rule,
    Section,
    Text,
    Verbatim,
    has_mark,
    key_table,
)
from dllm_jepa.config._describe import Phrase
from dllm_jepa.config._parse import load_config, parse, read_config, recipe_config
from dllm_jepa.config._resume import check_resume
from dllm_jepa.config._rules import has_adapters
from dllm_jepa.packaged import find_configs, find_recipes, resolve_config

__all__ = [
    "Checkpoint",
    "Component",
    "Config",
    "Count",
    "Dtype",
    "Given",
    "Launch",
    "MayChange",
    "PathText",
    "Phrase",
    "Rate",
    "Rule",
    "Section",
    "Text",
    "TrainedModel",
    "Training",
    "Verbatim",
    "check_resume",
    "find_configs",
    "find_recipes",
    "has_adapters",
    "has_mark",
    "key_table",
    "load_config",
    "locate",
    "parse",
    "read_config",
    "recipe_config",
    "resolve_config",
    "rules",
]
