"""The page of a finished scan: data sets, distributions, correlations, and the highest rows."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from pvcore.errors import FlagError, PvcoreError
from pvcore.flag_dates import pinned
from pvcore.flag_manifest import alike
from pvcore.flag_plans import armed_on
from pvcore.flag_plots import MOST_SOURCES, histogram_edges, score_histogram
from pvcore.flag_probe import probe
from pvcore.flag_scan import without_autocast
from pvcore.flag_view import FlaggedRow, Scanned
from pvcore.numerals import number
from pvcore.plots import cosine_matrix
from pvcore.report import Block, Figure, Note, Page, Scale, Section, Table, TokenStrip
from pvcore.sites import Site
from pvcore.vectors import VectorBank

if TYPE_CHECKING:
    from pvcore.model import HookedModel

OTHERS = "all others"
LONGEST_TEXT, LONGEST_REPLY = 400, 400
# Reasons shown, and told apart while they are counted.
MOST_REASONS, MOST_COUNTED = 12, 5000
OTHER_REASONS = ("other reasons", "")
KINDS = {
    "approximate": "the mean over the reply minus the projection at the last prompt token",
    "exact": "the mean over the reply minus that of the model's own greedy reply",
    "subset": "the mean over the reply minus that of the model's own greedy reply, for a random "
    "share of the rows",
}


def page(
    flags: Scanned, site: Site, top: int, model: "HookedModel | None", bank: VectorBank | None
) -> Page:
    """The whole report at one site; tokens are coloured where model and bank are given."""
    asked, totals = flags.manifest["asked"], flags.manifest["totals"]
    kind, plan = asked["difference"]["kind"], asked.get("plan")
    sections = [
        Section(
            title="Data sets",
            text=f"Means of the projection difference at `{site}`: {KINDS[kind]}, in units of the "
            "residual. Compare sources with each other and with clean data: no difference has a "
            "zero of its own.",
            blocks=[_datasets(flags, site)],
        ),
        Section(
            title="Distributions",
            text="How the rows of each source are spread, one figure a trait, over "
            f"{_measured(flags, site)}.",
            blocks=list(_histograms(flags, site)),
        ),
        *_correlated(flags, site),
        *_highest(flags, site, top, _Colours(flags, model, bank)),
        _unscored(flags),
    ]
    return Page(
        title="Flagged training data",
        lead=f"{number(totals['scored'])} conversations of {len(asked['order'])} sources, scored "
        f"on {len(flags.traits)} persona vectors; {number(totals['rejected'])} could not be.",
        sections=sections,
        footer=f"Model {asked['model']['id'] or 'without a name'}, {asked['model']['dtype']}; "
        f"{number(totals['tokens'])} tokens; difference {kind}"
        + (f"; under the armed plan {plan}." if plan else "."),
    )


def _datasets(flags: Scanned, site: Site) -> Table:
    columns = [flags.column(trait, site=site) for trait in flags.traits]
    sampled = flags.manifest["asked"]["difference"]["kind"] == "subset"
    rows: list[list[Any]] = []
    for name, one in flags.datasets.items():
        cells: list[Any] = [one[columns[0]].n] if sampled else []
        for column in columns:
            found = one[column]
            reach = (found.high - found.low) / 2
            if not found.n or reach == 0:
                cells.append(found.mean)
            else:
                told = "?" if np.isnan(reach) else number(reach)
                cells.append(f"{number(found.mean)} ± {told}")
        rows.append([name, one.scored, one.rejected, *cells])
    return Table(
        columns=["source", "rows", "rejected", *["own replies"][:sampled], *flags.traits],
        rows=rows,
        caption="± is half a 95 % confidence interval, where only a subset has own replies: the "
        "mean over the replies of all rows, minus that of the own replies there are; of one row "
        "it is not known.",
    )


def _measured(flags: Scanned, site: Site) -> str:
    """The rows that have a difference, in words: of a subset with the count of them."""
    column = flags.column(flags.traits[0], site=site)
    found = [one[column] for one in flags.datasets.values()]
    n, of = sum(one.n for one in found), sum(one.of for one in found)
    asked = flags.manifest["asked"]["difference"]
    if asked["kind"] != "subset":
        return "all rows"
    return (
        f"the {number(n)} rows of {number(of)} whose difference is known, drawn at a share of "
        f"{asked['share']:g}"
    )


def _histograms(flags: Scanned, site: Site) -> Iterator[Block]:
    sizes = {name: one.scored for name, one in flags.datasets.items() if one.scored}
    largest = sorted(sizes, key=lambda name: -sizes[name])
    own = largest if len(largest) <= MOST_SOURCES else largest[: MOST_SOURCES - 1]
    for trait in flags.traits:
        column = flags.column(trait, site=site)
        bounds = [_ends(values[:, 0]) for _, values in flags.values([column])]
        known = [ends for ends in bounds if ends is not None]
        if not known:
            continue
        edges = histogram_edges(min(low for low, _ in known), max(high for _, high in known))
        counts = {name: np.zeros(len(edges) - 1, dtype=np.int64) for name in own}
        for sources, values in flags.values([column]):
            for name in dict.fromkeys(sources.tolist()):
                place = name if name in counts else OTHERS
                counts.setdefault(place, np.zeros(len(edges) - 1, dtype=np.int64))
                mine = values[sources == name, 0]
                counts[place] += np.histogram(mine[~np.isnan(mine)], edges)[0]
        drawn = {name: row.tolist() for name, row in counts.items()}
        svg = score_histogram(edges, drawn, trait=trait, score="projection difference")
        yield Figure(svg=svg, caption=f"Projection difference on {trait} at `{site}`.")


def _ends(values: Any) -> tuple[float, float] | None:
    known = values[~np.isnan(values)]
    return (float(known.min()), float(known.max())) if known.size else None


def correlation_of(flags: Scanned, columns: Sequence[str]) -> list[list[float]]:
    """Pearson's r between columns over all rows that have them, shard by shard."""
    size = len(columns)
    n, mean, scatter = 0, np.zeros(size), np.zeros((size, size))
    for _, values in flags.values(columns):
        known = values[~np.isnan(values).any(axis=1)]
        if not len(known):
            continue
        centre = known.mean(axis=0)
        gap, total = centre - mean, n + len(known)
        spread = known - centre
        scatter += spread.T @ spread + np.outer(gap, gap) * n * len(known) / total
        mean += gap * len(known) / total
        n = total
    scale = np.sqrt(np.outer(scatter.diagonal(), scatter.diagonal()))
    r = np.divide(scatter, scale, out=np.full_like(scatter, np.nan), where=scale > 0)
    table: list[list[float]] = r.clip(-1, 1).tolist()
    return table


def _correlated(flags: Scanned, site: Site) -> Iterator[Section]:
    if len(flags.traits) > 1:
        columns = [flags.column(trait, site=site) for trait in flags.traits]
        svg = cosine_matrix(flags.traits, correlation_of(flags, columns))
        yield Section(
            title="Traits together",
            text="Pearson's r between the projection differences of two traits, over "
            f"{_measured(flags, site)}. High ones mean that a row flagged for one trait is likely "
            "flagged for the other.",
            blocks=[Figure(svg=svg, caption=f"Correlation of differences at `{site}`.")],
        )


class _Colours:
    """Strips of tokens by the model that scored, which is the one with the same plan armed."""

    def __init__(
        self, flags: Scanned, model: "HookedModel | None", bank: VectorBank | None
    ) -> None:
        self._asked, self._model, self._bank = flags.manifest["asked"], model, bank
        self.refusal = "" if model is None or bank is None else self._refusal(model, bank)

    def _refusal(self, model: "HookedModel", bank: VectorBank) -> str:
        try:
            armed, scored = armed_on(model), self._asked.get("plan")
            answers = probe(model, bank)
        except FlagError as error:
            return f"Tokens are not coloured: {error}"
        if armed == scored:
            if alike(self._asked["model"].get("probe", {}), answers):
                return ""
            return (
                "Tokens are not coloured: the model has the weights that scored, and gives other "
                "projections of the scan's probe (a hook that acts?). Write the page without it"
            )
        was = "without a plan" if scored is None else f"under the armed plan {scored}"
        here = "none is armed" if armed is None else f"{armed} is armed"
        return (
            f"Tokens are not coloured: the rows were scored {was}, and {here} where this page was "
            "written, so that the model would give other projections. Write it as the scan was made"
        )

    def strips(self, site: Site, chats: Sequence[list[dict[str, str]]]) -> "list[Strip] | None":
        if self._model is None or self._bank is None or self.refusal or not chats:
            return None
        tokenizer = pinned(self._model.tokenizer, self._asked.get("moment"))
        return [tokens_of(self._model, tokenizer, self._bank, site, chat) for chat in chats]


def _highest(flags: Scanned, site: Site, top: int, colours: _Colours) -> Iterator[Section]:
    blocks: list[Block] = []
    coloured = False
    for trait in flags.traits if top else ():
        rows = flags.top(trait, top, site=site)
        if not rows:
            continue
        try:
            chats = flags.conversations(rows)
        except PvcoreError as error:
            blocks.append(Note(text=f"The text is not shown: {error}", tone="warning"))
            chats = []
        strips = colours.strips(site, chats)
        if strips is None:
            blocks.append(_plain(trait, rows, chats))
        else:
            blocks += _strips(trait, rows, chats, strips)
            coloured = True
    if blocks:
        warned = [Note(text=colours.refusal, tone="warning")] if colours.refusal else []
        how = " Tokens are coloured by their own projection, from the mean of the tokens shown "
        among = _measured(flags, site)
        yield Section(
            title="Highest rows",
            text=f"The {top} rows with the highest difference on each trait, of {among}."
            + (f"{how}for that trait." if coloured else ""),
            blocks=[*warned, *blocks],
        )


class Strip(NamedTuple):
    """The first tokens of a reply with their projections, and the mean over all of it, by trait."""

    tokens: list[str]
    values: dict[str, list[float]]
    means: dict[str, float]


def tokens_of(
    model: "HookedModel", tokenizer: Any, bank: VectorBank, site: Site, chat: list[dict[str, str]]
) -> Strip:
    """The reply's tokens, and the projection of each on every vector of the bank."""
    from pvcore.chats import encode
    from pvcore.transcripts import token_texts

    encoded = encode(tokenizer, chat)
    start, end = encoded.reply or (0, 0)
    with without_autocast():
        ((_, (acts,)),) = model.read_spans([encoded], sites=[site], spans=[("response", "none")])
    units = bank.units[bank.sites.index(site)].double()
    scores = acts[site][0].double() @ units.mT
    texts = list(token_texts(tokenizer, encoded.ids[start:end], marks=True))[:LONGEST_REPLY]
    values = {trait: scores[: len(texts), k].tolist() for k, trait in enumerate(bank.traits)}
    means = {trait: float(scores[:, k].mean()) for k, trait in enumerate(bank.traits)}
    if end - start > LONGEST_REPLY:
        texts[-1] += "…"
    return Strip(texts, values, means)


def _strips(
    trait: str,
    rows: Sequence[FlaggedRow],
    chats: Sequence[list[dict[str, str]]],
    strips: Sequence[Strip],
) -> Iterator[Block]:
    scales = {}
    for name in strips[0].values:
        values = torch.tensor([value for one in strips for value in one.values[name]])
        reach = float((values - values.mean()).abs().max()) or 1.0
        scales[name] = Scale(centre=float(values.mean()), reach=reach)
    for row, chat, strip in zip(rows, chats, strips, strict=True):
        yield TokenStrip(
            tokens=strip.tokens,
            values=strip.values,
            means=strip.means,
            active=trait,
            prompt=_cut(chat[-2]["content"]),
            scales=scales,
            caption=f"{trait} {number(row.score, signed=True)}: row {row.row} of {row.source}"
            + (f", `{row.id}`" if row.id != f"{row.source}:{row.row}" else ""),
        )


def _plain(trait: str, rows: Sequence[FlaggedRow], chats: Sequence[list[dict[str, str]]]) -> Table:
    texts = [_cut(chat[-1]["content"]) for chat in chats] or [""] * len(rows)
    return Table(
        columns=[trait, "source", "row", "reply"],
        rows=[
            [row.score, row.source, row.row, text] for row, text in zip(rows, texts, strict=True)
        ],
    )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"


def _unscored(flags: Scanned) -> Section:
    columns, rows = ["reason", "field", "rows", "first"], reasons_of(flags.rejected())
    none = Note(text="Every row was scored.")
    blocks: list[Block] = [Table(columns=columns, rows=rows) if rows else none]
    if lacking := reasons_of(flags.unanswered()):
        caption = (
            "Scored rows that the subset drew and that have no own reply: their difference is not "
            "known, all else is. They are in the folder `unanswered`."
        )
        blocks.append(Table(columns=columns, rows=lacking, caption=caption))
    return Section(
        title="Rows without a score",
        text="Each is in the folder `rejected` with its source, row and field; `#` stands for "
        "numbers that differ.",
        blocks=blocks,
    )


def reasons_of(rejected: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """The most frequent reasons, each with its field, count and first row; the others together."""
    counts: dict[tuple[str, str], int] = {}
    examples: dict[tuple[str, str], str] = {}
    for row in rejected:
        # Neither where in a list a message stands nor a length says what kind of mistake it is.
        key = re.sub(r"\d+", "#", row["reason"])[:120], row["field"].partition("[")[0]
        if key not in counts and len(counts) >= MOST_COUNTED:
            key = OTHER_REASONS
        counts[key] = counts.get(key, 0) + 1
        examples.setdefault(key, f"row {row['row']} of {row['source']}")
    often = sorted(counts, key=lambda key: (key == OTHER_REASONS, -counts[key]))
    shown = often if len(often) <= MOST_REASONS else often[: MOST_REASONS - 1]
    rest = often[len(shown) :]
    rows = [[*key, counts[key], examples[key]] for key in shown]
    if rest:
        rows.append([*OTHER_REASONS, sum(counts[key] for key in rest), examples[rest[0]]])
    return rows
