"""Does machine code of sm_90 read a uniform register that nothing has written?

The ptxas of Triton 3.6 may compute an address only where a loop is entered, and use it in the next loop too. If the first loop
has no turn, nothing has written that address.
"""

import re

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P[0-9T]+ )?([A-Z][A-Za-z0-9_.]*)([^;]*);")
_TO_UNIFORM = ("R2UR", "S2UR", "VOTEU", "REDUX")
_NOT_TO_UNIFORM = ("UTMA", "USETMAXREG", "UBLK")


def read_before_written(disassembly: str) -> list[str]:
    """The instructions that read such a register on some path from the entry."""
    code = [(int(a, 16), bool(p), name, operands) for a, p, name, operands in _LINE.findall(disassembly)]
    followers = _followers(code)
    used = [_registers(name, operands) for _, _, name, operands in code]
    written: list[frozenset[int] | None] = [None] * len(code)
    written[0], todo = frozenset(), [0]
    while todo:
        here = todo.pop()
        after = written[here] | used[here][1]
        for each in followers[here]:
            known = after if written[each] is None else written[each] & after
            if known != written[each]:
                written[each] = known
                todo.append(each)
    reached = [n for n, known in enumerate(written) if known is not None]
    assert len(reached) > 0.95 * len(code)  # the rest are waits that hang, and padding
    return [f"{code[n][0]:#x} {code[n][2]}{code[n][3]}" for n in reached if used[n][0] - written[n]]


def _followers(code: list[tuple[int, bool, str, str]]) -> list[list[int]]:
    """What may run after each instruction."""
    at = {address: n for n, (address, *_) in enumerate(code)}
    # Where warps go that were specialized, by a table of jumps.
    parts = [n - 1 for n in range(1, len(code)) if code[n][2].startswith("USETMAXREG") and code[n - 1][2] == "NOP"]
    found = []
    for n, (_, has_predicate, name, operands) in enumerate(code):
        following = [n + 1] if n + 1 < len(code) else []
        if name.startswith("BRX"):
            following = parts
        elif name.startswith("BRA"):
            target = at[int(operands.split("0x")[-1].strip(), 16)]
            following = [target, *(following if has_predicate or "," in operands else ())]
        elif name.startswith(("EXIT", "RET")) and not has_predicate:
            following = []
        found.append(following)
    return found


def _registers(name: str, operands: str) -> tuple[set[int], set[int]]:
    """The uniform registers that an instruction reads and writes."""
    to_uniform = name.startswith(_TO_UNIFORM) or (name.startswith("U") and not name.startswith(_NOT_TO_UNIFORM))
    wide = 2 if ".64" in name and to_uniform else 1
    reads: set[int] = set()
    writes: set[int] = set()
    for operand in (each.strip() for each in operands.split(",")):
        if to_uniform and not writes and re.fullmatch(r"UR\d+", operand):
            first = int(operand[2:])
            writes |= {first, first + 1} if wide == 2 or "WIDE" in name else {first}
        elif operand.startswith("gdesc"):  # of the left operand, if that is no register, and of the right one
            first = int(re.search(r"UR(\d+)", operand)[1])
            reads |= set(range(first + (2 if re.search(r"R\d+, *R\d+, *gdesc", operands) else 0), first + 4))
        else:
            for register in re.findall(r"UR(\d+)", operand):
                reads |= set(range(int(register), int(register) + wide))
    return reads, writes
