"""A GGUF file as a folder of safetensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from meerkat.errors import ModelError

__all__ = ["convert_gguf"]


def convert_gguf(path: Path, dtype: torch.dtype, folder: Path) -> None:
    """Write model and tokenizer: a GGUF takes half a minute to read, the folder two seconds.

    Raises:
        ModelError: The file cannot be read, or the packages for it are not installed.
    """
    try:
        with _opened_once():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype
            )
    except ImportError:
        raise ModelError(
            f"{path.name} needs the packages gguf and accelerate: pip install 'meerkat-fl[gguf]'"
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path.name} cannot be read: {str(error).splitlines()[0]}") from None
    # The weights are plain tensors by now; transformers would still refuse to save them.
    vars(model).update(hf_quantizer=None, is_quantized=False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.name_or_path = path.stem
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _opened_once() -> Iterator[None]:
    """transformers opens the file for tokenizer, configuration and weights, and each time reads the
    whole vocabulary (15 s for 262,144 tokens): in here the first reader serves all three."""
    import gguf

    opened = gguf.GGUFReader
    gguf.GGUFReader = cache(opened)
    try:
        yield
    finally:
        gguf.GGUFReader = opened
