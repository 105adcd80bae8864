"""Prompts as what a text encoder made of them: rows of named tensors, in memory or in a file, with the empty prompt behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqlib.system.files import write_tensors
from vqlib.system.fingerprint import digest


class Prompts:
    """P prompts by number: `texts` and named tensors [P + 1, …], whose last row is the prompt that stands for "none".

    Raises ValueError where the number of rows is another, naming the tensor.
    """

    def __init__(self, texts: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        self.texts, self.tensors = tuple(texts), dict(tensors)
        for name, rows in self.tensors.items():
            if len(rows) != len(self.texts) + 1 or not len(self.texts):
                raise ValueError(
                    f"{len(rows)} rows of {name} for {len(self.texts)} prompts: need one each, and one for none"
                )
        self._here: dict[str, Tensor] = self.tensors

    def rows(self, labels: Tensor, like: Tensor) -> dict[str, Tensor]:
        """The rows of labels [R] on their device, floats in the dtype of `like`; masks stay what they are."""
        if next(iter(self._here.values())).device != labels.device:
            self._here = {name: values.to(labels.device) for name, values in self.tensors.items()}
        found = {name: values[labels] for name, values in self._here.items()}
        return {name: rows.to(like.dtype) if rows.is_floating_point() else rows for name, rows in found.items()}

    def require(self, family: str, names: tuple[str, ...]) -> Prompts:
        """These prompts, if they hold just the tensors of that name. ValueError naming the family, what it needs and what is there."""
        if set(self.tensors) != set(names):
            raise ValueError(f"{family} needs prompts with {', '.join(names)}; there are {', '.join(self.tensors)}")
        return self

    def fingerprint(self) -> str:
        """SHA-256 of all tensors."""
        return digest(sorted(self.tensors.items()), "prompts")

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all; returns its path."""
        path = Path(path).expanduser()
        write_tensors(path, dict(self.tensors), {"prompts": json.dumps(self.texts, ensure_ascii=False)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Prompts:
        """Read what `save` wrote. FileNotFoundError, ValueError naming the file."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no file of prompts {path}")
        try:
            with safe_open(path, "pt") as file:
                texts = json.loads((file.metadata() or {})["prompts"])
                return cls(texts, {name: file.get_tensor(name) for name in file.keys()})
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is no file of prompts ({error})") from None


def joined(texts: Sequence[str], given: Mapping[str, Tensor], none: Mapping[str, Tensor]) -> Prompts:
    """Prompts from the encodings [P, …] of the texts and those [≥ 1, …] of the empty prompt, whose first row counts."""
    return Prompts(texts, {name: torch.cat([rows, none[name][:1]]).cpu() for name, rows in given.items()})
