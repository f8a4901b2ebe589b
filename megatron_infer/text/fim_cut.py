"""What a long prompt leaves out. Numbers in, numbers out; while one types, they stay the same as long as they can."""

from __future__ import annotations

from collections.abc import Callable

REACHES = (8, 32)
"""Characters per budget token: text further from the cursor is not tokenized. Code has about 4 to a token."""


def plan_reach(num_prefix: int, num_suffix: int, reach: int) -> tuple[int, int]:
    """How many characters to leave out of a long prefix and suffix before they are tokenized, to bound the work.

    The prefix starts at a multiple of a quarter of the reach: while one types, it starts where it did before.
    """
    quarter = max(1, reach // 4)
    return max(0, (num_prefix - reach) // quarter * quarter), max(0, num_suffix - reach)


def plan_cut(num_prefix: int, num_suffix: int, room: int) -> tuple[int, int]:
    """The fewest tokens to drop from the prefix's head and from the suffix's tail, so that the rest fits into `room`.

    Three quarters of the room are the prefix's, and either side may use what the other leaves.
    """
    suffix_share = room // 4
    prefix_room = max(room - suffix_share, room - num_suffix)
    suffix_room = max(suffix_share, room - num_prefix)
    return max(0, num_prefix - prefix_room), max(0, num_suffix - suffix_room)


def cut_at_step(least: int, num_tokens: int, room: int, is_line_end: Callable[[int], bool]) -> int:
    """How many of a side's tokens to drop: at least `least`, at one of few places, where a line ends if one does.

    There is a place in every step of a twelfth of the room: behind the first line end in the step's first half, or at
    its start. So the cut stays for the length of a step while one types, and the KV cache behind it stays valid. Both
    sides together waste less than a quarter of the room. `is_line_end(i)`: whether dropping i tokens cuts at a line's
    end.
    """
    if not least:
        return 0
    step = max(1, room // 12)
    at = 0
    for start in range(max(1, least // step) * step, least + 2 * step, step):
        at = next((i for i in range(start, start + step // 2 + 1) if i < num_tokens and is_line_end(i)), start)
        if at >= least:
            break
    return min(at, num_tokens)
