"""Configs: where they are, what may stand in them, and checking all of it at once before anything is loaded."""

from dllm_jepa.config._kinds import (
    REQUIRED,
    ArgumentRange,
    Choice,
    Component,
    Flag,
    Key,
    Number,
    Section,
    Text,
)
from dllm_jepa.config._parse import load_config, parse, read_config
from dllm_jepa.config._resolve import find_configs, find_recipes, resolve_config
from dllm_jepa.config._resume import check_resume
from dllm_jepa.config._rules import Launch
from dllm_jepa.config._schema import EVALUATION, GENERATION, LORA, SCHEMAS, TRAINING, Schema, schema_of
from dllm_jepa.config._validate import problems, validate, warnings, with_defaults

__all__ = [
    "EVALUATION",
    "GENERATION",
    "LORA",
    "REQUIRED",
    "SCHEMAS",
    "TRAINING",
    "ArgumentRange",
    "Choice",
    "Component",
    "Flag",
    "Key",
    "Launch",
    "Number",
    "Schema",
    "Section",
    "Text",
    "check_resume",
    "find_configs",
    "find_recipes",
    "load_config",
    "parse",
    "problems",
    "read_config",
    "resolve_config",
    "schema_of",
    "validate",
    "warnings",
    "with_defaults",
]
