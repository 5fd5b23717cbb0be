"""Every error a user can meet. Each text says what came, what was wanted and what to do."""


class PvcoreError(Exception):
    """Base of every error pvcore raises on purpose."""


class SiteError(PvcoreError):
    """A site that the model does not have, or that is written wrongly."""


class SpanError(PvcoreError):
    """A span that is unknown, empty, or cannot be located in the tokens."""


class ChatError(PvcoreError):
    """A chat that cannot be turned into token ids without guessing."""


class VectorError(PvcoreError):
    """A persona vector, bank or vector file that cannot be used."""


class FormatError(PvcoreError):
    """A file of another tool that cannot be read, or that cannot hold what is to be written."""


class HubError(PvcoreError):
    """A Hugging Face Hub repository that cannot be reached, or has no vector to give."""


class PlanError(PvcoreError):
    """An intervention or plan that does not fit the model, the batch or itself."""


class ModelError(PvcoreError):
    """A model whose residual stream cannot be located or hooked safely."""


class HookError(PvcoreError):
    """A plan that did not act where, or as often as, it must."""


class TraceError(PvcoreError):
    """A trace that cannot be run here or now."""


class LensError(PvcoreError):
    """Something TransformerLens names or needs that this model does not have."""


class TraitError(PvcoreError):
    """A trait that is unknown or badly described."""


class JudgeFailure(PvcoreError):
    """A judgement that could not be made; never turned into a number."""


class JudgeRefusal(JudgeFailure):
    """An answer that the judge declined to read."""


class CompletionError(PvcoreError):
    """A language model server that gave no usable reply."""


class CompletionRefused(CompletionError):
    """A prompt that a server or its model declined to answer."""


class AnswersError(PvcoreError):
    """A file of kept answers that is something else, or that cannot be written."""


class ExtractionError(PvcoreError):
    """An extraction that has nothing to average."""


class StatisticsError(PvcoreError):
    """A statistic asked of numbers that do not have it."""


class ExportError(PvcoreError):
    """What was seen cannot be written where, or as, it was asked for."""


class CalibrationError(PvcoreError):
    """A calibration that cannot be made, or that a vector does not have."""


class WorkError(PvcoreError):
    """A work folder that belongs to another run, or that cannot be used."""


class SelectionError(PvcoreError):
    """A steering sweep in which there is nothing to choose."""


class SourceError(PvcoreError):
    """A file or data set of conversations that cannot be read."""


class EvaluationError(PvcoreError):
    """A task of lm-eval that cannot be asked of the model here."""


class FlagError(PvcoreError):
    """A scan of training data that cannot be made, resumed or read as asked."""
