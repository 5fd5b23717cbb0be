"""Recomputes: which run patched a block that gradient checkpointing runs again."""

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pvcore.errors import HookError
from pvcore.runs import Run
from pvcore.sites import Site

# A site of a block, or the decoder as a whole.
Place = Site | Literal["decoder"]


# Of the autograd node that is made next in this thread.
node_number = torch._C._autograd._get_sequence_nr


class Recomputes:
    """Which run patched a checkpointed block, for the backward pass that recomputes it.

    Backward passes run later, in other threads and in any order, so neither a context variable
    nor the newest forward tells. The block is given the very tensor it was given before: its
    storage does, as long as that lives. Entries whose backward never comes go with it. A block that
    is given a copy is found out by the number of the autograd node that runs it again.
    """

    LIMIT = 1 << 16
    FORWARDS = 1 << 10

    def __init__(self) -> None:
        # Public, because an idle tap looks at every block whether there are any.
        self.runs: OrderedDict[tuple[Place, int], tuple[StorageWeakRef, Run]] = OrderedDict()
        self._lock = threading.Lock()
        # The first and last number of the nodes each steered forward recorded, and where it was.
        self._steered: deque[tuple[int, int, frozenset[Site]]] = deque(maxlen=self.FORWARDS)

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

    def note(self, first: int, sites: Iterable[Site]) -> None:
        """A forward that is over was steered at these sites, and recorded nodes from `first` on."""
        with self._lock:
            self._steered.append((first, node_number(), frozenset(sites)))

    def refuse_copy(self, site: Site) -> None:
        """Raise `HookError` if the node under way is of a forward that was steered at a site."""
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        with self._lock:
            known = list(self._steered)
        if any(first <= number < end and site in sites for first, end, sites in known):
            raise HookError(
                f"got a checkpoint that runs the block at {site} again on a copy of its input, as "
                "activation offloading makes it, where it cannot be steered as it was; turn the "
                "copying off, or checkpoint inside the block's hooks, as newer transformers do"
            )

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
