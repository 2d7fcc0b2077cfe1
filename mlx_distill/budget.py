"""The wall that `--max-cost` is: what may still be sent, so that the limit holds whatever comes back.

A request leaves only if its worst case, on top of all that is spent and of the worst cases of all that is under way,
stays within the limit. What was cut off and may have been billed counts with its worst case. The worst case of an
input is a token a byte, which no tokenizer of a listed model exceeds, and some for the frame around it; of an
output, its token limit.
"""

from __future__ import annotations

import asyncio

from mlx_distill.errors import ConfigError
from mlx_distill.ledger import Spending
from mlx_distill.pricing import FREE, Price
from mlx_distill.records import Request, Usage

#: Tokens that a provider may add to each request for roles and the like.
FRAME_TOKENS = 64

#: US dollars by which sums of floating-point numbers may differ.
_ROUNDING = 1e-9


def worst_usage(request: Request) -> Usage:
    """The most tokens that a request can be billed."""
    texts = [request.system or "", *(message.content or "" for message in request.messages)]
    return Usage(
        input_tokens=sum(len(text.encode()) for text in texts) + FRAME_TOKENS, output_tokens=request.max_tokens
    )


class Budget:
    """What may still be spent.

    Args:
        price: Of the teacher; None where it is not known.
        limit: In US dollars, for all requests of the ledger; None for no limit.
        spent: What the ledger says was spent before.

    Raises:
        ConfigError: There is a limit, and no price to hold it with.
    """

    def __init__(self, price: Price | None, limit: float | None = None, spent: Spending | None = None) -> None:
        if limit is not None and price is None:
            raise ConfigError(
                "--max-cost cannot be held: this teacher has no listed price.",
                hint="Leave --max-cost away if you know what it costs.",
            )
        self.price = price
        self.limit = limit
        self._taken = 0.0 if spent is None else spent.most
        self._under_way = 0
        self._changed = asyncio.Condition()

    def worst(self, request: Request, *, batch: bool = False) -> float | None:
        """The most that one sending of a request can cost, in US dollars; None where the price is not known."""
        if self.price is None:
            return None
        return 0.0 if self.price == FREE else self.price.cost(worst_usage(request), batch=batch)

    def take(self, amount: float | None) -> bool:
        """Set an amount aside, if it fits."""
        if self.limit is None or amount is None:
            return True
        if self._taken + amount > self.limit + _ROUNDING:
            return False
        self._taken += amount
        return True

    async def reserve(self, amount: float | None) -> bool:
        """Set an amount aside for one sending; where it does not fit, wait for what is under way to cost less.

        Returns:
            False if it does not fit even then.
        """
        async with self._changed:
            while not self.take(amount):
                if not self._under_way:
                    return False
                await self._changed.wait()
            self._under_way += 1
            return True

    async def settle(self, reserved: float | None, actual: float | None) -> None:
        """Replace what was set aside for a sending by what it came to."""
        async with self._changed:
            self._taken += (actual or 0.0) - (reserved or 0.0)
            self._under_way -= 1
            self._changed.notify_all()
