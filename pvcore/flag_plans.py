"""Plans armed around a scan: their fingerprint, which every score and own reply depends on."""

from pvcore.blocks import find_decoder
from pvcore.errors import FlagError
from pvcore.fingerprints import of_text
from pvcore.guards import Guard
from pvcore.model import HookedModel
from pvcore.plan import Plan
from pvcore.sessions import session_on
from pvcore.taps import taps_of


def armed_on(model: HookedModel) -> str | None:
    """A fingerprint of the interventions armed on a model in this thread; None where none acts.

    Monitors change nothing, and prevention acts in training only: neither counts. Raises
    `FlagError` for a monitor that acts on alarms, which no fingerprint could tell of.
    """
    session = session_on(taps_of(find_decoder(model.hf)).key)
    if session is None:
        return None
    if any(isinstance(one, Guard) and (one.acts or one.dials) for one in session.readers):
        raise FlagError(
            "got a scan inside a monitor that acts on alarms, which would change some own replies "
            "and not others; wanted a plan, or a monitor that only watches"
        )
    # By site, because the order of two plans matters only where both act.
    acting = {
        str(site): [Plan(*one.interventions).fingerprint for one in here if not one.trains_only]
        for site, here in session.programs.items()
    }
    found = {site: plans for site, plans in acting.items() if plans}
    return of_text(found) if found else None
