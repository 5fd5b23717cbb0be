"""Recomputes: which run patched a block that gradient checkpointing runs again."""

import threading
from collections import OrderedDict
from typing import Literal

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pvcore.runs import Run
from pvcore.sites import Site

# A site of a block, or the decoder as a whole.
Place = Site | Literal["decoder"]


class Recomputes:
    """Which run patched a checkpointed block, for the backward pass that recomputes it.

    Backward passes run later, in other threads and in any order, so neither a context variable
    nor the newest forward tells. The block is given the very tensor it was given before: its
    storage does, as long as that lives. Entries whose backward never comes go with it.
    """

    LIMIT = 1 << 16

    def __init__(self) -> None:
        # Public, because an idle tap looks at every block whether there are any.
        self.runs: OrderedDict[tuple[Place, int], tuple[StorageWeakRef, Run]] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, place: Place, given: Tensor, run: Run) -> None:
        storage = StorageWeakRef(given.untyped_storage())  # type: ignore[no-untyped-call]
        with self._lock:
            self.runs[place, given.data_ptr()] = storage, run
            self.runs.move_to_end((place, given.data_ptr()))
            if len(self.runs) > self.LIMIT:
                self.runs.popitem(last=False)

    def find(self, place: Place, given: Tensor) -> Run | None:
        """The run that patched the block given this tensor; None where nothing did.

        An address says nothing by itself: another tensor may have taken it over.
        """
        known = self.runs.get((place, given.data_ptr()))
        if known is None or known[0].cdata != given.untyped_storage()._cdata:
            return None
        return known[1]

    def forget(self, place: Place, given: Tensor) -> None:
        """An unpatched forward was given this address: what was there before is gone."""
        with self._lock:
            self.runs.pop((place, given.data_ptr()), None)

    def prune(self) -> None:
        """Let go of blocks whose tensors are gone: no backward pass can recompute them."""
        with self._lock:
            gone = [key for key, (storage, _) in self.runs.items() if _expired(storage)]
            for key in gone:
                del self.runs[key]


def _expired(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]
