"""Activation checkpointing: what one call of a block keeps until its backward.

    none       whatever its operations save
    selective  its input, and what `Kept.once` computed: products (behind their collectives) and attention; the rest is computed again
    full       its input

A block that is checkpointed runs twice, in forward and again when its backward first asks for a saved tensor. No names of operations are
compared: what is computed once says so where it is computed, so neither its kernels nor its collectives run in the repetition.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Result = Tensor | tuple[Tensor, ...]


class Kept:
    """What one call of a block keeps. Holds no graph: a tensor with its history in here would keep itself alive.

    Attributes:
        again: whether this is the repetition.
    """

    def __init__(self, mode: str = "none"):
        self.mode = mode if torch.is_grad_enabled() else "none"
        self.again = False
        self._results: deque[Result] = deque()

    @property
    def backward_is_next(self) -> bool:
        """Whether what runs now is what backward works from, not a forward that is repeated before."""
        return self.again or self.mode == "none"

    def run(self, function: Callable[..., Tensor], *args) -> Tensor:
        """`function(*args)`, which is called again before its backward unless all is kept."""
        if self.mode == "none":
            return function(*args)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return contextlib.nullcontext(), self._repetition()

        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def once(self, compute: Callable[[], Result]) -> Result:
        """`compute()`; under selective its result is kept, and the repetition takes that."""
        if self.mode != "selective":
            return compute()
        if self.again:
            return self._results.popleft()
        result = compute()
        whole = isinstance(result, Tensor)
        self._results.append(result.detach() if whole else tuple(x.detach() for x in result))
        return result

    @contextlib.contextmanager
    def _repetition(self) -> Iterator[None]:
        self.again = True
        try:
            yield
        finally:
            self.again = False


KEEP_ALL = Kept()
"""Of what is not in a block."""
