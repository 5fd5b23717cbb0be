"""Taps: permanent hooks on a decoder's blocks. What they do is data, found in a context variable.

A hook is put on once and never taken off, so arming a plan touches no module: threads and
concurrent requests never see each other's plans, and nothing can be left behind. An idle tap
costs one context-variable read. This is the only module that registers torch hooks.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature

import torch

from pvcore import lanes
from pvcore.blocks import Decoder
from pvcore.errors import HookError
from pvcore.frames import Call, Outcome, running
from pvcore.hooks import Begin, End, Mid, Post, Pre, Tapped
from pvcore.programs import SiteProgram
from pvcore.resident import traces
from pvcore.runs import RUN, disarm, unseen
from pvcore.sessions import ARMED, ARMINGS, Reader, Session, session_on
from pvcore.sessions import hold as hold_session
from pvcore.sites import Site, resid_post, resid_pre
from pvcore.turns import Turn

_TAPPING = threading.Lock()


class Taps(Tapped):
    """The permanent hooks of one decoder."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.turn = Turn()
        self._lock = threading.Lock()
        self._tapped: set[Site] = set()
        self._refuse_compiled("this model")
        torch.compiler.assume_constant_result(traces)  # type: ignore[no-untyped-call]
        names = tuple(signature(decoder.owner.forward).parameters)
        with ExitStack() as undo:
            posts = []
            for layer, block in enumerate(decoder.blocks):
                site = resid_post(layer)
                post = Post(self, site)
                handle = block.register_forward_hook(post)
                undo.callback(handle.remove)
                posts.append((block, (handle, post)))
                self._tapped.add(site)
            end = End(self, resid_pre(0))
            last = decoder.owner.register_forward_hook(end)
            undo.callback(last.remove)
            # Last, because `taps_of` knows a tapped decoder by this hook.
            begin = Begin(self, names)
            first = decoder.owner.register_forward_pre_hook(begin, with_kwargs=True)
            undo.callback(first.remove)
            if lanes.safe():
                for block, after in posts:
                    lanes.give_block_lane(
                        block,
                        after=after,
                        place=(self.key, after[1].depth),
                        running=RUN.get,
                        recomputes=self.recomputes.runs,
                    )
                lanes.give_lane(decoder.owner, before=(first, begin), after=(last, end))
            # Taken off again only where the decoder's blocks have changed.
            self._off = undo.pop_all()

    def tap(self, site: Site) -> None:
        """Make sure a site can fire. `SiteError` where the model lacks it."""
        self.decoder.require(site)
        with self._lock:
            if site in self._tapped:
                return
            self._refuse_compiled(str(site))
            if site.kind == "resid_mid":
                norm = self.decoder.mid_norm(site.layer)
                handle = norm.register_forward_pre_hook(Mid(self, site))
            else:
                block = self.decoder.blocks[site.layer]
                handle = block.register_forward_pre_hook(Pre(self, site), with_kwargs=True)
            self._off.callback(handle.remove)
            self._tapped.add(site)

    def fit(self, decoder: Decoder) -> bool:
        """Whether these taps are on the very blocks that a decoder has now, all of them."""
        return len(decoder.blocks) == len(self.decoder.blocks) and all(
            block is tapped
            and any(isinstance(h, Post) and h.taps is self for h in block._forward_hooks.values())
            for block, tapped in zip(decoder.blocks, self.decoder.blocks, strict=True)
        )

    def take_off(self) -> None:
        """Remove every hook: what is still armed through them says that no forward ran."""
        self._off.close()

    def _refuse_compiled(self, what: str) -> None:
        """A compiled module ignores hooks that come later, without a word: raise instead."""
        for module in self.decoder.root.modules():
            if lanes.is_compiled(module):
                raise HookError(
                    f"got {what} untapped in a model that is already compiled, which would ignore "
                    "it; make the HookedModel, and arm resid_pre and resid_mid sites once, before "
                    "torch.compile"
                )

    @contextmanager
    def armed(
        self,
        programs: Mapping[Site, SiteProgram],
        *,
        readers: Sequence[Reader] = (),
        row_counts: frozenset[int] = frozenset(),
        stop_at: Site | None = None,
    ) -> Iterator[Session]:
        """Run programs and readers in every forward of this decoder inside the block.

        Raises `HookError` on leaving if no forward ran, unless an error is already on its way.
        """
        session = self._session(programs, readers, row_counts, stop_at)
        ARMED.set({**(ARMED.get() or {}), self.key: session})
        ARMINGS.count(1)
        known = False
        missed = 0
        try:
            yield session
            missed = unseen(session, self.key)
        finally:
            ARMINGS.count(-1)
            known = disarm(session, self.key)
        if not known:
            raise HookError(
                "got a block that is left in another context (a task, or a thread's copy) than it "
                "was entered in, where nothing was armed; enter and leave it in one place"
            )
        if not session.acted:
            raise HookError(
                "got an armed plan and no forward of the model inside its block; run the model "
                "inside it (a copy, or a compiled twin made earlier, does not count)"
            )
        if missed:
            raise HookError(
                f"got {missed} decode steps inside an armed block that passed no tap: transformers "
                "ran a step that it compiled before this model was hooked (for it or for another "
                "of its class); call torch.compiler.reset() before, or use model.generate(..., "
                "engine='graph')"
            )

    def hold(
        self,
        programs: Mapping[Site, SiteProgram],
        *,
        lapsed: Callable[[], bool],
        readers: Sequence[Reader] = (),
        row_counts: frozenset[int] = frozenset(),
    ) -> Callable[[], None]:
        """Arm programs that act with gradients on until `lapsed`, or until the result is called.

        Readers are held in every forward.
        """
        session = self._session(programs, readers, row_counts, lapsed=lapsed)
        release = ExitStack()
        if readers:
            ARMINGS.count(1)
            release.callback(ARMINGS.count, -1)
        release.callback(hold_session(session, self.key))
        return release.close

    def _session(
        self,
        programs: Mapping[Site, SiteProgram],
        readers: Sequence[Reader] = (),
        row_counts: frozenset[int] = frozenset(),
        stop_at: Site | None = None,
        lapsed: Callable[[], bool] | None = None,
    ) -> Session:
        """A session on top of the one there is, with a tap at every site of it."""
        for site in {*programs, *(site for reader in readers for site in reader.sites)}:
            self.tap(site)
        return Session(
            programs,
            readers=readers,
            row_counts=row_counts,
            stop_at=stop_at,
            lapsed=lapsed,
            outer=session_on(self.key),
        )

    @contextmanager
    def calling(self, call: Call) -> Iterator[list[Outcome]]:
        """Declare the call of the forwards inside the block, and close it for every reader.

        A generation puts its outcome into the list.
        """
        session = session_on(self.key)
        readers = session.readers if session else ()
        outcomes: list[Outcome] = []
        finished = False
        try:
            with running(self.key, call):
                yield outcomes
            finished = True
        finally:
            for reader in readers:
                reader.close(call, outcomes[0] if finished and outcomes else None)

    def is_armed(self) -> bool:
        """Whether a plan is armed on this decoder in the current context."""
        return session_on(self.key) is not None


def taps_of(decoder: Decoder) -> Taps:
    """The taps of a decoder, put on the first time it is seen, and anew if its blocks changed."""
    with _TAPPING:
        taps = _taps_on(decoder)
        if taps is not None and not taps.fit(decoder):
            taps.take_off()
            taps = None
        return taps or Taps(decoder)


def is_tapped(decoder: Decoder) -> bool:
    """Whether a decoder has its taps already."""
    with _TAPPING:
        return _taps_on(decoder) is not None


def _taps_on(decoder: Decoder) -> Taps | None:
    hooks = decoder.owner._forward_pre_hooks.values()
    tapped = (hook.taps for hook in hooks if isinstance(hook, Begin))
    return next((taps for taps in tapped if isinstance(taps, Taps)), None)
