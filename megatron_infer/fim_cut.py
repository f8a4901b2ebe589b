"""What a long prompt leaves out. Numbers in, numbers out; while one types, they stay the same as long as they can."""

from __future__ import annotations

import math

REACH = 32
"""Characters per budget token: text further from the cursor is not tokenized. Code has about 4 to a token."""


def plan_reach(num_prefix: int, num_suffix: int, budget_tokens: int) -> tuple[int, int]:
    """How many characters to leave out of a long prefix and suffix before they are tokenized, to bound the work.

    The prefix starts at a multiple of the reach, so that its start, and with it every cut, stays while one types.
    """
    reach = max(1, budget_tokens) * REACH
    return max(0, num_prefix // reach - 1) * reach, max(0, num_suffix - reach)


def plan_cut(num_prefix: int, num_suffix: int, room: int) -> tuple[int, int]:
    """How many tokens to drop from the prefix's head and from the suffix's tail, so that the rest fits into `room`.

    Three quarters of the room are the prefix's, and either side may use what the other leaves. Drops are whole
    multiples of a step of about an eighth of the room: while one types, the cuts stay where they are for a step's
    length, and the KV cache of everything behind them stays valid.
    """
    if num_prefix + num_suffix <= room:
        return 0, 0
    step = max(1, room // 8)
    if step >= 64:
        step -= step % 64
    prefix_share = room - room // 4
    prefix_room = max(prefix_share, room - num_suffix)
    suffix_room = max(room - prefix_share, room - num_prefix)
    drop_prefix = math.ceil(max(0, num_prefix - prefix_room) / step) * step
    drop_suffix = math.ceil(max(0, num_suffix - suffix_room) / step) * step
    return min(drop_prefix, num_prefix), min(drop_suffix, num_suffix)
