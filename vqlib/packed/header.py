"""The header of a packed checkpoint, checked before anything is allocated from what it claims.

The format is described in `vqlib.packed.container`. Here: which tensors the file says it holds and where, the manifest of
checksums, and whether both can be true of a file of this size and a model of this geometry.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from vqlib.kernels.bits import bits_for, packed_size

FORMAT = 1
WEIGHTS = "diffusion_pytorch_model.safetensors"
MAX_SETTING = 1 << 24
SIZES = ("size", "dim", "dims", "layers", "heads", "channels")  # how settings end that are whole numbers
MAX_TABLE = 1 << 26  # numbers in a position table; SD3's 192×192×1536 is 56.6 million
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that is damaged, mislabelled or not ours; the message names file, tensor and reason."""

    def __init__(self, file: Path | str, tensor: str, reason: str) -> None:
        message = f"{file}: {tensor + ': ' if tensor else ''}{reason}"
        super().__init__(message.encode("utf-8", "backslashreplace").decode())  # a damaged name may not be printable
        self.file, self.tensor, self.reason = str(file), tensor, reason


class Entry(NamedTuple):
    """One tensor as the header claims it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """A header that passed `read_header`: entries tile the file exactly, manifest fits the entries."""

    file: Path
    entries: dict[str, Entry]
    config: str
    digests: dict[str, str]
    aliases: dict[str, str]

    def find(self, name: str) -> Entry | None:
        """The entry that holds `name`, followed through its alias."""
        return self.entries.get(self.aliases.get(name, name))

    def layers(self) -> list[str]:
        """Names of the quantized layers."""
        return [name.removesuffix(".codes") for name in self.entries if name.endswith(".codes")]

    def names(self) -> list[str]:
        """Every name of the state dict that this file provides."""
        scales = {f"{layer}.scale" for layer in self.layers()}
        return sorted({*self.entries, *self.aliases, *scales})


def read_header(file: Path) -> Header:
    """The header of a packed checkpoint, and nothing else of it. Raises CheckpointError.

    safetensors checks that tensors have the sizes of their types and shapes, lie end to end and fill the file.
    """
    try:
        with safe_open(file, "pt") as stream:
            metadata, slices = stream.metadata() or {}, {name: stream.get_slice(name) for name in stream.keys()}
            entries = {name: Entry(DTYPES[s.get_dtype()], tuple(s.get_shape())) for name, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(file, "", f"cannot be read as safetensors ({error})") from None
    except KeyError as error:
        raise CheckpointError(file, "", f"holds a tensor of {error}, not of {', '.join(DTYPES)}") from None
    return _with_manifest(file, entries, metadata)


def parse_json(raw: bytes, file: Path, part: str) -> dict[str, Any]:
    """One JSON object without repeated keys. Raises CheckpointError on anything else."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, "", f"{part} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(file, "", f"{part} is a JSON {type(value).__name__}, not an object")
    return value


def require_plausible(file: Path, settings: Mapping[str, Any], names: int) -> None:
    """Refuse a config whose skeleton alone would exhaust memory or time, before it is built. Raises CheckpointError.

    names: tensors the weights provide; a model has at least one tensor in every layer.
    """
    for key, value in settings.items():
        for number in _numbers(value):
            if key.endswith(SIZES) and (number < 0 or not isinstance(number, int)):
                raise CheckpointError(file, key, f"{number} is no size")
            if isinstance(number, int) and (number > MAX_SETTING or ("layers" in key and number > names)):
                raise CheckpointError(file, key, f"{number} cannot be right for a file of {names} tensors")
    widest = max((v for k, v in settings.items() if isinstance(v, int) and "dim" in k), default=1)
    width = max(widest, widest * _whole(settings.get("num_attention_heads")))
    for key in ("sample_size", "pos_embed_max_size"):  # position tables are computed, not stored: [tokens, width]
        side = _whole(settings.get(key)) // (_whole(settings.get("patch_size")) if key == "sample_size" else 1)
        if side * side * width > MAX_TABLE:
            reason = f"{settings[key]} asks for a position table of {side}×{side}×{width} numbers"
            raise CheckpointError(file, key, reason)


def require_layer(header: Header, layer: str, in_features: int, out_features: int) -> tuple[int, int, torch.dtype]:
    """k, d and codebook dtype of a layer whose claims fit its geometry. Raises CheckpointError naming the tensor."""
    codes, book = header.find(f"{layer}.codes"), header.find(f"{layer}.codebook")
    if book is None:
        raise CheckpointError(header.file, f"{layer}.codebook", "is missing")
    if len(book.shape) != 2 or not book.dtype.is_floating_point or not 1 <= book.shape[0] <= 1 << 16:
        reason = f"is {NAMES[book.dtype]} {list(book.shape)}, not a floating codebook [k, d] with k up to 65536"
        raise CheckpointError(header.file, f"{layer}.codebook", reason)
    k, d = book.shape
    if d < 1 or in_features % d:
        reason = f"d={d} does not divide in_features {in_features}"
        raise CheckpointError(header.file, f"{layer}.codebook", reason)
    expected = packed_size(out_features * in_features // d, bits_for(k))
    if codes.dtype != torch.uint8 or codes.shape != (expected,):
        reason = (
            f"is {NAMES[codes.dtype]} {list(codes.shape)}; a weight [{out_features}, {in_features}] with k={k}, "
            f"d={d} takes U8 [{expected}]"
        )
        raise CheckpointError(header.file, f"{layer}.codes", reason)
    return k, d, book.dtype


def sha256(*parts) -> str:
    """Hexadecimal SHA-256 of the parts, one after the other."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def _numbers(value: Any) -> Iterator[int | float]:
    """The numbers of a setting, in lists too."""
    if isinstance(value, (int, float)):
        yield value
    for part in value if isinstance(value, list) else ():
        yield from _numbers(part)


def _whole(value: Any) -> int:
    return max(1, value) if isinstance(value, int) else 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is repeated")
    return result


def _with_manifest(file: Path, entries: dict[str, Entry], metadata: Mapping[str, str]) -> Header:
    if "vqlib" not in metadata:
        raise CheckpointError(file, "", "has no vqlib manifest: it is not a packed checkpoint")
    raw = metadata["vqlib"].encode("utf-8", "replace")
    if sha256(raw) != metadata.get("vqlib_sha256"):
        raise CheckpointError(file, "", "the manifest does not have the checksum that was saved with it")
    manifest = parse_json(raw, file, "manifest")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(file, "", f"format {manifest.get('format')!r}; this version reads format {FORMAT}")
    config, digests, aliases = (manifest.get(key) for key in ("config", "tensors", "aliases"))
    if not isinstance(digests, dict) or not isinstance(aliases, dict):
        raise CheckpointError(file, "", "the manifest lacks its tables of tensors and aliases")
    for name in digests.keys() ^ entries.keys():
        raise CheckpointError(file, name, "is missing" if name in digests else "is not in the manifest")
    for name, source in aliases.items():
        if name in entries or not isinstance(source, str) or source not in entries or name.endswith(".codes"):
            raise CheckpointError(file, name, f"is an alias of {source!r}, which cannot be")
    return Header(file, entries, str(config), digests, aliases)
