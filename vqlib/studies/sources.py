"""Pipelines by their contents: what a task is given in place of weights, and what opens it where the task runs."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from vqlib.models import pipeline
from vqlib.models.pipeline import ORIGINAL_VAE, Pipeline
from vqlib.system.fingerprint import fingerprint
from vqlib.system.memory import device_label

_given: weakref.WeakValueDictionary[Source, Pipeline] = (
    weakref.WeakValueDictionary()
)  # somebody else's, in this process
_loaded: dict[Source, Pipeline] = {}  # the last one that was loaded here


@dataclass(frozen=True)
class Source:
    """A pipeline: SHA-256 of transformer and VAE, and the names it is loaded by, which do not count."""

    transformer: str
    vae: str
    name: str = field(compare=False)
    vae_name: str = field(default=ORIGINAL_VAE, compare=False)

    @classmethod
    def of(cls, pipe: Pipeline, vae_name: str = ORIGINAL_VAE) -> Source:
        """Of a pipeline in this process, which `open` then gives as long as somebody holds it."""
        source = cls(fingerprint(pipe.transformer), fingerprint(pipe.vae), pipe.name, str(vae_name))
        _given[source] = pipe
        return source

    def open(self, device: str) -> Pipeline:
        """The pipeline, on the kind of device that a `device_label` says; loaded once a process.

        Raises RuntimeError where the name leads to other weights here, or the device is another one.
        """
        pipe = _given.get(self) or _loaded.get(self)
        if pipe is None:
            pipe = pipeline.load(self.name, vae=self.vae_name, device="cpu" if device == "cpu" else "cuda")
            found = Source.of(pipe, self.vae_name)
            if found != self:
                raise RuntimeError(
                    f"{self.name} has other weights here: SHA-256 {found.transformer[:12]}… and {found.vae[:12]}…, "
                    f"the study's are {self.transformer[:12]}… and {self.vae[:12]}…"
                )
            _loaded.clear()
            _loaded[self] = pipe
        if device_label(pipe.device) != device:
            raise RuntimeError(f"this worker computes on {device_label(pipe.device)}, the study's rows on {device}")
        return pipe
