"""A kernel's machine code as a graph, and what the ways through it cost."""

from __future__ import annotations

import heapq
import re
from functools import cached_property

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")


class Code:
    """A kernel's machine code as a graph of basic blocks."""

    def __init__(self, listing: str, width: str = "128"):
        self.width = width  # in bits, of what its main loop loads and stores
        self.at = [int(address, 16) for address, _ in _INSTRUCTION.findall(listing)]
        self.text = [text for _, text in _INSTRUCTION.findall(listing)]
        self.opcodes = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in self.text]
        index = {address: i for i, address in enumerate(self.at)}
        leaders, jumps = {0}, {}
        for i, text in enumerate(self.text):
            name = self.opcodes[i]
            if name.split(".")[0] in ("BRA", "EXIT", "RET", "BRX", "JMP"):
                leaders.add(i + 1)
            # A call under a condition is a jump too far for a branch; one without is the slow way of a division.
            if (name.startswith("BRA") and "DIV" not in name) or (name.startswith("CALL.REL") and text.startswith("@")):
                jumps[i] = index[int(_TARGET.search(text).group(1), 16)]
                leaders |= {jumps[i], i + 1}
        starts = sorted(i for i in leaders if i < len(self.text))
        self.blocks = dict(zip(starts, [*starts[1:], len(self.text)], strict=True))
        self.next = {start: self._successors(end - 1, jumps) for start, end in self.blocks.items()}

    def _successors(self, last: int, jumps) -> list[int]:
        name, conditional = (
            self.opcodes[last],
            self.text[last].startswith("@") or re.search(r"\bBRA\S* !?U?P\d", self.text[last]),
        )
        following = [last + 1] if last + 1 < len(self.text) else []
        if last in jumps:
            return [jumps[last], *(following if conditional else [])]
        if name.split(".")[0] in ("EXIT", "RET", "BRX"):  # no case may need a jump table, which is not followed
            return following if conditional else []
        return following

    @cached_property
    def _costs(self) -> dict[int, int]:
        return {start: sum(name != "NOP" for name in self.opcodes[start:end]) for start, end in self.blocks.items()}

    def cost(self, block: int) -> int:
        return self._costs[block]

    def count(self, block: int, prefix: str, width: str = "") -> int:
        return sum(
            self.opcodes[i].startswith(prefix) and width in self.opcodes[i] for i in range(block, self.blocks[block])
        )

    @cached_property
    def loops(self) -> list[tuple[int, set[int]]]:
        """(head, blocks) of every loop."""
        return [
            (head, self._loop(head, tail))
            for tail, successors in self.next.items()
            for head in successors
            if head <= tail
        ]

    @cached_property
    def main_loop(self) -> tuple[int, set[int]]:
        """(head, blocks) of the smallest loop that loads and stores so much at a time."""
        wide = [
            (head, body)
            for head, body in self.loops
            if all(sum(self.count(b, name, self.width) for b in body) for name in ("LDG", "STG"))
        ]
        return min(wide, key=lambda loop: sum(map(self.cost, loop[1])))

    def _loop(self, head: int, tail: int) -> set[int]:
        """The natural loop of a back edge: what reaches `tail` without passing `head`."""
        before: dict[int, list[int]] = {}
        for block, successors in self.next.items():
            for successor in successors:
                before.setdefault(successor, []).append(block)
        body, todo = {head}, [tail]
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo += before.get(block, [])
        return body

    def done(self, block: int) -> tuple[int, int, int]:
        """Wide loads and stores, and multiply-adds, of a block."""
        adds = self.count(block, "FFMA") + self.count(block, "FFMA2")
        return self.count(block, "LDG", self.width), self.count(block, "STG", self.width), adds

    def shortest(self, starts, goal, need=(0, 0, 0), within=None, done=None) -> int:
        """Instructions of the cheapest way from `starts` to a block that is a goal, with so many loads, stores and
        multiply-adds on the way, or of what else `done` counts; within some blocks, or all."""
        return self.way(starts, goal, need, within, done)[0]

    def way(self, starts, goal, need=(0, 0, 0), within=None, done=None) -> tuple[int, list[int]]:
        """That way: what it costs, and its blocks but for the last. Raises ValueError where there is none."""
        done = done or self.done
        gives = {block: done(block) for block in self.blocks}
        nothing = (0,) * len(need)
        queue = [(0, block, nothing, None) for block in starts]
        before: dict[tuple, tuple | None] = {}
        while queue:
            cost, block, made, origin = heapq.heappop(queue)
            if goal(block) and cost > 0:
                if made == need:
                    return cost, self._followed(origin, before)
                continue
            if (block, made) in before:
                continue
            before[block, made] = origin
            here = block, made
            made = tuple(min(most, a + b) for most, a, b in zip(need, made, gives[block], strict=True))
            for onward in self.next[block]:
                if within is None or onward in within:
                    heapq.heappush(queue, (cost + self.cost(block), onward, made, here))
        raise ValueError("no such way through the code")

    @staticmethod
    def _followed(state, before) -> list[int]:
        blocks = []
        while state is not None:
            blocks.append(state[0])
            state = before[state]
        return blocks[::-1]
