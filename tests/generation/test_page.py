"""The page: the steps of the denoising, and text that stays text."""

import html.parser
import json
from typing import Any

import pytest

from dllm_jepa.generation.show import denoising_page, record_denoising
from dllm_jepa.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MASK, END = TOKENIZER.mask_id, TOKENIZER.eos_id
HOSTILE = "</script><script>alert(1)</script><!-- & \u2028 \x1b[31m \u202e"


class Elements(html.parser.HTMLParser):
    """The elements of a page by a parser of its own: tags, attributes, and the text of scripts and of the rest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._in_script = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.texts.append(data)


def rows_of(page: str) -> list[dict[str, Any]]:
    data, code = Elements(page).scripts
    assert "use strict" in code
    return json.loads(data)


def test_pieces_carry_the_step_that_filled_them() -> None:
    a, b = (TOKENIZER.encode(letter)[0] for letter in "ab")
    emoji = TOKENIZER.encode("\U0001f600")
    denoising = record_denoising(TOKENIZER, "a prompt", [a, *emoji, b, END, MASK], [3, 1, 7, 2, 2, 4, 6, 0])
    (row,) = rows_of(denoising_page([denoising], facts={}))
    assert row == {
        "prompt": "a prompt",
        "num_steps": 7,
        "cells": [
            {"text": "a", "step": 3, "is_end": False},
            {"text": "\U0001f600", "step": 7, "is_end": False},  # whole with the last of its bytes
            {"text": "b", "step": 4, "is_end": False},
            {"text": "<|endoftext|>", "step": 6, "is_end": True},
            {"text": "", "step": None, "is_end": False},
        ],
    }


@pytest.mark.parametrize("where", ["prompt", "response", "facts"])
def test_hostile_text_stays_text(where: str) -> None:
    ids = TOKENIZER.encode(HOSTILE if where == "response" else "fine")
    prompt = HOSTILE if where == "prompt" else "fine"
    denoising = record_denoising(TOKENIZER, prompt, ids, [1] * len(ids))
    page = denoising_page([denoising], facts={"model": HOSTILE if where == "facts" else "fine"})
    harmless = denoising_page(
        [record_denoising(TOKENIZER, "fine", TOKENIZER.encode("fine"), [1, 1, 1, 1])], facts={"model": "fine"}
    )
    assert page.isascii()
    assert Elements(page).tags == Elements(harmless).tags
    shown = "</script><script>alert(1)</script><!-- & \\u2028 \\x1b[31m \\u202e"
    (row,) = rows_of(page)
    assert row["prompt"] == (shown if where == "prompt" else "fine")
    assert "".join(cell["text"] for cell in row["cells"]) == (shown if where == "response" else "fine")
    assert (shown in Elements(page).texts) == (where == "facts")


def test_every_prompt_is_on_the_page_and_nothing_is_loaded() -> None:
    denoisings = [record_denoising(TOKENIZER, f"prompt {number}", [END], [1]) for number in range(3)]
    page = denoising_page(denoisings, facts={"steps": "12"})
    assert [row["prompt"] for row in rows_of(page)] == ["prompt 0", "prompt 1", "prompt 2"]
    tags = Elements(page).tags
    assert not [(tag, name) for tag, attributes in tags for name in attributes if name in ("src", "href", "srcset")]
    assert "url(" not in page and "@import" not in page
    (policy,) = (attributes["content"] for _, attributes in tags if "http-equiv" in attributes)
    assert policy is not None and policy.startswith("default-src 'none'")
    assert {"steps", "12"} <= set(Elements(page).texts)
