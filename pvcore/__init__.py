"""Read, watch and change the residual stream of language models along persona vectors."""

from pvcore import formats as formats
from pvcore import hub as hub
from pvcore.activations import Activations as Activations
from pvcore.errors import JudgeFailure as JudgeFailure
from pvcore.errors import PvcoreError as PvcoreError
from pvcore.extraction import Extraction as Extraction
from pvcore.extraction import extract as extract
from pvcore.interventions import Ablate as Ablate
from pvcore.interventions import Add as Add
from pvcore.interventions import Cap as Cap
from pvcore.judge import Judge as Judge
from pvcore.model import HookedModel as HookedModel
from pvcore.moments import Moments as Moments
from pvcore.monitor import Seen as Seen
from pvcore.monitor import TraitScores as TraitScores
from pvcore.plan import Plan as Plan
from pvcore.provenance import Provenance as Provenance
from pvcore.sites import Site as Site
from pvcore.sites import resid_mid as resid_mid
from pvcore.sites import resid_post as resid_post
from pvcore.sites import resid_pre as resid_pre
from pvcore.stream import Alarm as Alarm
from pvcore.stream import Step as Step
from pvcore.traits import Trait as Trait
from pvcore.vectors import PersonaVector as PersonaVector
from pvcore.vectors import VectorBank as VectorBank
