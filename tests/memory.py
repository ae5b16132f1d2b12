"""The most bytes of tensor storage that a function makes, at any moment, by watching every operation. Works on pretended tensors."""

import weakref
from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._see(x.untyped_storage(), before)
        return out

    def _see(self, storage, before: set[int]) -> None:
        key = id(storage)
        if key in self.known or key in before:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_of(function: Callable) -> int:
    watch = _Watch()
    with watch:
        function()
    return watch.peak


class Alive(TorchDispatchMode):
    """Every storage that an operation touches, and which of them are alive: also those that only C++ holds."""

    def __init__(self):
        super().__init__()
        self.known: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor):
                storage = getattr(x, "_local_tensor", x).untyped_storage()
                known = self.known.get(storage._cdata)
                if known is None or known.expired():
                    self.known[storage._cdata] = StorageWeakRef(storage)
        return out

    def _storages(self) -> list[torch.UntypedStorage]:
        self.known = {key: ref for key, ref in self.known.items() if not ref.expired()}
        return [torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self.known.values()]

    def count(self) -> int:
        return len(self._storages())

    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages() if storage is not None)
