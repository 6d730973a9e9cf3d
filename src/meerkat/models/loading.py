"""Load a causal LM (hub id, folder, GGUF, a demo package), its tokenizer and fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from meerkat.config import ModelSection, Runtime
from meerkat.errors import ModelError
from meerkat.models.compute import computes_in_float32, widen
from meerkat.models.demo_models import DemoModel, demo_model
from meerkat.models.gguf_files import convert_gguf

__all__ = [
    "VOLATILE",
    "LoadedModel",
    "cache_dir",
    "choose_device",
    "configuration_digest",
    "empty_model",
    "fingerprint",
    "load_model",
    "loaded_of",
    "probe_logits",
]


@dataclass(frozen=True)
class LoadedModel:
    """A model with frozen parameters in evaluation mode, and what belongs to it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    """SHA-256 of the parameters' names, shapes, types and bits."""
    name: str
    configuration: str = ""
    """SHA-256 of what else decides on the logits: its configuration, and its tokenizer."""
    probe: tuple[float, ...] = ()
    """A few logits at the weights as they were loaded; see `probe_logits`."""

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by name."""
        return {name: tuple(p.shape) for name, p in self.model.named_parameters()}

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text, by the tokenizer and by the model's own settings."""
        listed = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        every = [self.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
        return frozenset(token for token in every if token is not None)

    @property
    def window(self) -> int:
        """Most tokens that a sequence may have."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 2**20)


def cache_dir(runtime: Runtime, *parts: str) -> Path:
    """A folder for what can be made again: `runtime.cache_dir`, $MEERKAT_CACHE, or the user's."""
    root = runtime.cache_dir or os.environ.get("MEERKAT_CACHE")
    folder = Path(root or platformdirs.user_cache_dir("meerkat")).joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def choose_device(runtime: Runtime) -> torch.device:
    """The device of `runtime.device`.

    Raises:
        ModelError: It is not a device, or not one of this machine.
    """
    name = runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ModelError(f"runtime.device = {name!r} is not on this machine; use 'cpu'") from None
    return device


def load_model(section: ModelSection, runtime: Runtime) -> LoadedModel:
    """Load the model that `model.name` names, in `model.dtype`, onto `runtime.device`.

    Raises:
        ModelError: There is no such model, a package for it is missing, or it is no causal LM.
    """
    transformers.utils.logging.disable_progress_bar()
    device = choose_device(runtime)
    dtype = getattr(torch, section.dtype)
    name = _source(section, runtime)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loaded(section, error) from None
    torch.nn.Module.to(model, device)
    loaded = loaded_of(model, tokenizer, section.name)
    if computes_in_float32(runtime.compute, dtype, device):
        widen(model)  # fingerprint and probe are those of the stored weights, on every machine
    return loaded


def loaded_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> LoadedModel:
    """A model in memory with what belongs to it; from here on frozen and in evaluation mode."""
    model.eval().requires_grad_(False)
    return LoadedModel(
        model,
        tokenizer,
        fingerprint(model),
        name,
        configuration_digest(model.config, tokenizer),
        probe_logits(model),
    )


def empty_model(section: ModelSection, runtime: Runtime) -> PreTrainedModel:
    """The architecture that `load_model` would load, in its types, without any weight.

    A model that has to be converted is converted, as its configuration is made by that.

    Raises:
        ModelError: There is no such model, a package for it is missing, or it is no causal LM.
    """
    name = _source(section, runtime)
    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, section.dtype))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loaded(section, error) from None
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _source(section: ModelSection, runtime: Runtime) -> str:
    """A folder or a hub id; what is in another form is converted into a folder.

    Raises:
        ModelError: There is no such file or folder.
    """
    name, dtype = section.name, getattr(torch, section.dtype)
    if name.startswith("demo:"):
        return str(_converted_demo(demo_model(name), dtype, runtime))
    if name.endswith(".gguf"):
        return str(_converted(Path(name), dtype, runtime))
    if (name.startswith((".", "/", "~")) or Path(name).exists()) and not Path(name).is_dir():
        raise ModelError(f"model.name = {name!r}: no such folder")
    return name


def _not_loaded(section: ModelSection, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0]
    return ModelError(f"model.name = {section.name!r} cannot be loaded: {reason}")


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over (name, type, shape, bits) of each parameter, tied ones once."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        data = parameter.detach().cpu().contiguous()
        bits: Any = data.view(-1).view(torch.uint8).numpy()
        digest.update(bits)
    return digest.hexdigest()


VOLATILE = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Fields of a configuration that say where it came from, and not what is computed."""
_TEXTS = (
    "It was great.",
    " Ça n'était  pas mal\n",
    "不错的电影",
    "def f(x): return x**2",
    "1234567 €",
)
"""Texts whose tokens a tokenizer is known by, beside its vocabulary."""


def configuration_digest(config: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the configuration's fields that differ from its class's, and the tokenizer.

    A changed `rms_norm_eps` or `rope_theta` leaves the parameters as they are, and so does another
    tokenizer: the model is another all the same.
    """
    fields = {k: v for k, v in config.to_diff_dict().items() if k not in VOLATILE}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for token, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{index} {token}\n".encode(errors="surrogatepass"))
    for text in _TEXTS:
        digest.update(f"{tokenizer(text, verbose=False)['input_ids']}\n".encode())
    return digest.hexdigest()


@torch.inference_mode()
def probe_logits(model: torch.nn.Module) -> tuple[float, ...]:
    """Logits of eight tokens after eight others: what a model with the same bits must compute, too.

    They show a difference of the code. Their last bits differ between processors, so they are
    compared with a tolerance (`transport.handshake.same_probe`).
    """
    vocabulary = int(getattr(model.config, "vocab_size", 2**10))
    ids = torch.arange(5, 13, device=next(model.parameters()).device)[None] % vocabulary
    logits = model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu()
    return tuple(logits[5 : 5 + 64 : 8].tolist())


def _converted_demo(demo: DemoModel, dtype: torch.dtype, runtime: Runtime) -> Path:
    demo.require()
    target = cache_dir(runtime, "models") / f"{demo.folder}-{str(dtype).removeprefix('torch.')}"

    def convert(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            convert_gguf(demo.checked_file(Path(scratch)), dtype, folder)

    return _made_once(target, convert)


def _converted(path: Path, dtype: torch.dtype, runtime: Runtime) -> Path:
    path = path.expanduser()
    if not path.is_file():
        raise ModelError(f"model.name = {str(path)!r}: no such file")
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    name = f"{path.stem}-{content}-{str(dtype).removeprefix('torch.')}"
    return _made_once(
        cache_dir(runtime, "models") / name, lambda folder: convert_gguf(path, dtype, folder)
    )


def _made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Make a folder, whole or not at all, unless it is there; safe beside another process."""
    if not target.exists():
        scratch = Path(tempfile.mkdtemp(dir=target.parent))
        try:
            make(scratch)
            scratch.chmod(0o755)
            scratch.rename(target)
        except OSError:
            if not target.exists():
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target
