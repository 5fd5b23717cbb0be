"""What a compiled generation cannot be: refused before anything runs."""

from collections.abc import Callable
from typing import Any

from pvcore.errors import ModelError, PlanError

_LOOP = ("get_compiled_call", "_valid_auto_compile_criteria", "_prepare_static_cache")
_OURS = ("compile_config", "disable_compile", "past_key_values")
# Names that generation configs of models carry for what is one static cache today.
_STATIC = ("static", "hybrid", "hybrid_chunked", "sliding_window")


def refuse_model(hf: Any) -> None:
    """Raise `ModelError` for a model that transformers does not decode in a loop of its own."""
    missing = [name for name in _LOOP if not hasattr(type(hf), name)]
    if missing:
        raise ModelError(
            f"got a {type(hf).__name__} without {', '.join(missing)}; engine='graph' drives "
            "transformers' own decode loop: hook the transformers model itself (for PEFT: "
            "merge_and_unload(), or get_base_model()), or use engine='eager'"
        )
    quantizer = getattr(hf, "hf_quantizer", None)
    places = {str(place) for place in (getattr(hf, "hf_device_map", None) or {}).values()}
    if (quantizer is not None and not quantizer.is_compileable) or (
        len(places) > 1 and places & {"cpu", "disk"}
    ):
        raise ModelError(
            f"got a {type(hf).__name__} whose weights are quantized or offloaded in a way that "
            "does not compile; use engine='eager'"
        )


def refuse_settings(setting: Callable[[str], Any]) -> None:
    """Raise `PlanError` for settings of a generation that a compiled one decides itself."""
    given = [name for name in _OURS if setting(name) not in (None, False)]
    if setting("cache_implementation") not in (None, *_STATIC):
        given.append("cache_implementation")
    if given:
        raise PlanError(
            f"got {', '.join(given)} with engine='graph', which brings its own cache and compiles "
            "by itself; leave it out, or pass pv.Graph(backend=..., mode=...) as the engine"
        )
    if (setting("num_beams") or 1) > 1:
        raise PlanError(
            "got beams with engine='graph', whose rows stay where they are; use engine='eager'"
        )
    if setting("use_cache") is False:
        raise PlanError("got use_cache=False with engine='graph'; it decodes on a static cache")
