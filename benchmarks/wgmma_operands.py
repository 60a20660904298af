"""Checks in machine code that nothing writes registers that the matrix unit still uses.

An HGMMA instruction runs while the next instructions of its thread run. The hardware
does not protect its registers. A program must wait for the group of the instruction
(`WARPGROUP.DEPBAR`) before it writes the left operand or the sums. See "Asynchronous
warpgroup level matrix instructions" in the PTX ISA.
"""

from __future__ import annotations

import re

# These have a register operand first, which they read.
READERS = ("ST", "RED", "ATOMS", "SYNCS", "BAR", "R2UR", "UTMA", "WARPGROUP", "BRA")


def operand_problems(body: list[str]) -> list[str]:
    """Returns the instructions of a loop that write registers in use.

    Args:
      body: instructions of the loop in order, without predicates. Branches within the
        loop are taken for straight code.

    Returns:
      Texts that name the register.
    """
    problems = []
    groups: list[set[int]] = []  # registers of each group that runs
    group: set[int] = set()
    # The second pass has the groups that the first leaves running.
    for text in (*body, *body):
        allowed = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)", text)
        if allowed:
            first = max(len(groups) - int(allowed[1], 16), 0)
            groups = groups[first:]
        elif text.startswith("HGMMA"):
            group = group | _used(text)
            if "gsb0" in text:
                groups, group = [*groups, group], set()
        else:
            used = group.union(*groups)
            both = sorted(used & _written(text))
            problems += [f"R{number} is in use: {text}" for number in both]
    return problems


def _used(text: str) -> set[int]:
    """Registers of an HGMMA: the sums, and the left operand if it is in registers."""
    columns = re.match(r"HGMMA\.64x(\d+)x", text)
    assert columns, text
    registers = [int(number) for number in re.findall(r"\bR(\d+)\b", text)]
    sums, *operands = registers
    used = set(range(sums, sums + int(columns[1]) // 2))
    # The last register is that of the sums again.
    for operand in operands[:-1]:
        used |= set(range(operand, operand + 4))
    return used


def _written(text: str) -> set[int]:
    """Registers that an instruction writes."""
    name = text.split()[0]
    if name.startswith(READERS):
        return set()
    first = re.match(r"\S+\s+(?:U?P\w+,\s*)*R(\d+)\b", text)
    if not first:
        return set()
    num = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
    return set(range(int(first[1]), int(first[1]) + num))
