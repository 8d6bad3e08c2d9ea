"""The characters of NL-RX lines, as bits: TAB, 0x20-0x7e, and one symbol for every other character.

A mask is a set of symbols: bit 0 is TAB, bits 1 to 95 are 0x20 to 0x7e in their order, bit 96 is every other one.
"""

import string

OTHER = 1 << 96
ALL = (1 << 97) - 1
_CODES = (ord("\t"), *range(0x20, 0x7F))


def symbol(character: str) -> int:
    """The mask of one character."""
    code = ord(character)
    if 0x20 <= code <= 0x7E:
        return 1 << (code - 0x1F)
    return 1 if character == "\t" else OTHER


def interval(first: str, last: str) -> int:
    """The mask of all characters from `first` to `last`, in the order of their code points; 0 if there is none."""
    named = [chr(code) for code in _CODES if ord(first) <= code <= ord(last)]
    others = ord(last) - ord(first) + 1 > len(named)
    return mask_of(named) | (OTHER if others else 0)


def mask_of(characters: str | list[str]) -> int:
    """The mask of several characters."""
    mask = 0
    for character in characters:
        mask |= symbol(character)
    return mask


DIGITS = mask_of(string.digits)
BLANKS = mask_of(" \t")
WORD = mask_of(string.ascii_letters + string.digits + "_")
