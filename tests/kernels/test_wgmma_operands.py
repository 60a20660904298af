"""The check of machine code finds registers that are written too early."""

from benchmarks.wgmma_operands import operand_problems

PRODUCT = "HGMMA.64x16x16.F32.BF16 R24, R{}, gdesc[UR16], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x{}"


def test_two_operands_by_turns_are_safe():
    body = [
        *("LDS.U16 R40, [R8]", PRODUCT.format(40), WAIT.format(1)),
        *("LDS.U16 R44, [R8]", PRODUCT.format(44), WAIT.format(1)),
    ]
    assert operand_problems(body) == []


def test_one_operand_is_written_while_it_is_read():
    """The product of one pass of the loop runs in the next pass."""
    body = ["LDS.64 R42, [R8]", PRODUCT.format(40), WAIT.format(1)]
    assert operand_problems(body) == [
        "R42 is in use: LDS.64 R42, [R8]",
        "R43 is in use: LDS.64 R42, [R8]",
    ]
    assert operand_problems([*body[:2], WAIT.format(0)]) == []


def test_sums_are_in_use_and_stores_only_read():
    body = [PRODUCT.format(40), "STS [R24], R25", "FADD R31, R31, R2", WAIT.format(0)]
    assert operand_problems(body) == ["R31 is in use: FADD R31, R31, R2"] * 2
