"""What is installed here, what this machine can run, and what of pvcore a model supports."""

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch

from pvcore.blocks import Decoder, find_decoder
from pvcore.errors import ModelError, PvcoreError, SiteError
from pvcore.sites import KINDS, Site
from pvcore.spans import SPANS
from pvcore_kernels import path_taken
from pvcore_kernels.paths import engine_path

CORE = ("pvcore", "torch", "transformers", "nnsight", "transformer-lens", "triton", "safetensors")
EXTRAS = {
    "judge": ("openai",),
    "gguf": ("gguf",),
    "train": ("peft", "trl"),
    "scan": ("ray",),
    "eval": ("lm-eval",),
    "serve": ("prometheus-client",),
    "bench": ("psutil",),
}
# Enough vectors for a bank, few enough for a kernel.
N_VEC = 8
PROBE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]


def installed() -> dict[str, Any]:
    """Versions of the core and of what each extra adds; None for what is not there."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "core": {name: version(name) for name in CORE},
        "extras": {extra: {name: version(name) for name in EXTRAS[extra]} for extra in EXTRAS},
    }


def machine() -> dict[str, Any]:
    """Devices, and by which paths the engines and kernels run on them."""
    gpus = range(torch.cuda.device_count())
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in gpus)]
    return {
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in torch",
        "gpus": list(map(_gpu, gpus)),
        "mps": torch.backends.mps.is_available(),
        "triton": "installed" if importlib.util.find_spec("triton") else "not installed",
        "kernels": {
            str(device): path_taken(device, dtype=torch.bfloat16, n_vec=N_VEC) for device in devices
        },
        "scores": {str(device): engine_path(device, dtype=torch.bfloat16) for device in devices},
        "engines": {
            "taps": "read, steer, monitor and stream, on any device of torch",
            "graph": "captures CUDA graphs" if gpus else "no GPU: runs its traced step as it is",
            "trace": _needs("nnsight"),
            "lens": _needs("transformer-lens"),
        },
    }


def model(name: str | Path) -> dict[str, Any]:
    """What a model supports. Its weights are not loaded: the configuration and tokenizer tell.

    Raises `ModelError` for what transformers cannot load as a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            hollow = AutoModelForCausalLM.from_config(config)
        decoder = find_decoder(hollow)
    except PvcoreError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"got model {str(name)!r}, whose configuration cannot be used ({error}); wanted a name "
            "on the hub or a folder of a causal language model of transformers"
        ) from error
    return {
        "name": str(name),
        "family": decoder.family,
        "layers": decoder.n_layers,
        "d_model": decoder.d_model,
        "blocks": decoder.path,
        "sites": {kind: _site(decoder, Site(kind, 0)) for kind in KINDS},
        **_chats(str(name)),
    }


def version(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    memory = found.total_memory / 2**30
    return f"cuda:{index}: {found.name}, sm_{found.major}{found.minor}, {memory:.0f} GiB"


def _needs(name: str) -> str:
    found = version(name)
    return f"{name} {found}" if found else f"needs {name}, which is not installed"


def _site(decoder: Decoder, site: Site) -> str:
    try:
        decoder.require(site)
    except SiteError as error:
        return f"no: {error}"
    return f"0 to {decoder.n_layers - 1}"


def _chats(name: str) -> dict[str, Any]:
    """Which chats the tokenizer takes, and which spans can be located in them."""
    from transformers import AutoTokenizer

    taken, reason = "messages, strings and token ids", ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        # Where a folder has none, some families are given one that knows its special tokens only.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            taken, reason = "token ids", "there is no tokenizer"
        elif not getattr(tokenizer, "chat_template", None):
            taken, reason = "strings and token ids", "the tokenizer has no chat template"
    # A model without a tokenizer can be used all the same; why it has none differs by family.
    except Exception as error:
        taken, reason = "token ids", f"no tokenizer can be loaded ({type(error).__name__})"
    if reason:
        spans = [span for span in SPANS if span != "response"]
        messages, located = f"no: {reason}", f"{', '.join(spans)}; response while generating"
    else:
        messages, located = _roles(tokenizer), ", ".join(SPANS)
    return {"chats": taken, "messages": messages, "spans": located}


def _roles(tokenizer: Any) -> str:
    from pvcore.chats import encode

    try:
        encode(tokenizer, PROBE)
    except PvcoreError as error:
        return f"no: {error}"
    try:
        encode(tokenizer, [{"role": "system", "content": "Be brief."}, *PROBE])
    except PvcoreError as error:
        return f"yes, without system prompts: {error}"
    return "yes, with system prompts"
