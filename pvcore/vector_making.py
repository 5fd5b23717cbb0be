"""Making vectors of judged rollouts: the filter, the pooling pass, and the difference of means."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256

from torch.nn.functional import cosine_similarity

from pvcore.chats import Encoded
from pvcore.errors import ExtractionError
from pvcore.extraction_result import Extraction
from pvcore.judge import Judgements
from pvcore.model import HookedModel
from pvcore.pooling import Pass, Pooled
from pvcore.provenance import Provenance
from pvcore.replies import shown
from pvcore.request_checks import check_real, check_whole
from pvcore.rollouts import Rollout, filtered, kept_of
from pvcore.sites import Site
from pvcore.vectors import PersonaVector, Variant
from pvcore.workbook import Workbook


@dataclass(frozen=True, slots=True)
class Making:
    """How vectors are made of rollouts."""

    model: HookedModel
    trait: str
    sites: tuple[Site, ...]
    threshold: float | int
    batch_size: int
    resamples: int
    seed: int
    progress: bool

    def settings(self) -> dict[str, str | int | float]:
        """What decides the vectors beside the rollouts."""
        return {
            "threshold": float(self.threshold),
            "sites": ", ".join(map(str, self.sites)),
            "batch size": self.batch_size,
            "resamples": self.resamples,
            "seed of the resamples": self.seed,
        }

    def check(self) -> None:
        """Raise, before anything is sampled or paid for, for sizes and sites that cannot be."""
        self.model.require(self.sites)
        check_whole(ExtractionError, 1, batch_size=self.batch_size)
        check_whole(ExtractionError, 0, resamples=self.resamples)
        check_whole(ExtractionError, seed=self.seed)
        check_real(ExtractionError, threshold=self.threshold)
        if self.resamples == 1:  # which may happen to draw no pair, and spans no interval
            raise ExtractionError("got resamples=1; wanted at least 2, or 0 for no intervals")

    def extraction(
        self,
        judged: Sequence[Rollout],
        encoded: Mapping[int, Encoded],
        judgements: Judgements,
        book: Workbook,
        made: Provenance,
    ) -> Extraction:
        """Filter, pool and subtract. `made` says where the rollouts come from."""
        self.check()
        rows = filtered(judged, self.threshold)
        wanted = Pass(
            model=self.model,
            encoded=[encoded[index] for index in kept_of(rows, self.trait)],
            sites=self.sites,
            batch_size=self.batch_size,
            resamples=self.resamples,
            seed=self.seed,
        )
        pooled = wanted.run(
            begun=book.pooled,
            save=book.keep_pooled if book.on_disk else None,
            shown=partial(shown, what="pooling") if self.progress else None,
        )
        provenance = self._provenance(rows, made).noting(judgements.counts)
        vectors = {
            variant: self._vector(variant, one, provenance)
            for variant, one in pooled.items()
            if variant == "response_mean" or one.tells_sides_apart
        }
        return Extraction(vectors=vectors, rollouts=rows, judgements=judgements)

    def _provenance(self, rows: Sequence[Rollout], made: Provenance) -> Provenance:
        chats = [row.chat[:-1] for row in rows]
        return replace(
            made,
            thresholds={"trait": self.threshold, "coherence": self.threshold},
            kept=sum(not row.dropped for row in rows),
            dropped=sum(bool(row.dropped) for row in rows),
            prompt_hash=sha256(json.dumps(chats).encode()).hexdigest(),
            seeds=(self.seed,),
        )

    def _vector(self, variant: Variant, pooled: Pooled, provenance: Provenance) -> PersonaVector:
        first, second = pooled.split
        statistics = {
            "split_half_cosine": cosine_similarity(first, second, dim=-1),
            "reply_spread": pooled.spread,
        }
        intervals = pooled.intervals()
        if intervals is not None:
            # As shares of the norm, so that a vector that is scaled may keep them.
            norm = pooled.vector.norm(dim=-1)
            statistics |= {
                "length_low": intervals.low / norm,
                "length_high": intervals.high / norm,
                "cosine_low": intervals.cosine_low,
            }
        return PersonaVector(
            trait=self.trait,
            sites=self.sites,
            directions=pooled.vector,
            model_id=self.model.model_id,
            revision=getattr(self.model.hf.config, "_commit_hash", None),
            variant=variant,
            provenance=provenance,
            statistics=statistics,
        )
