"""Pipelines by their contents: what a task is given in place of weights, and what opens it where the task runs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vqlib.calibrator.runs import differences
from vqlib.models import pipeline
from vqlib.models.pipeline import Pipeline
from vqlib.system.fingerprint import fingerprint
from vqlib.system.memory import device_label

_given: weakref.WeakValueDictionary[Source, Pipeline] = (
    weakref.WeakValueDictionary()
)  # somebody else's, in this process
_loaded: dict[Source, Pipeline] = {}  # the last one that was loaded here


@dataclass(frozen=True)
class Source:
    """A pipeline: SHA-256 of transformer and VAE, `Pipeline.identity`; and what loads it, which does not count."""

    transformer: str
    vae: str
    identity: Mapping[str, Any] = field(hash=False)
    name: str = field(compare=False)
    loaded_with: Mapping[str, Any] = field(compare=False)

    @classmethod
    def of(cls, pipe: Pipeline) -> Source:
        """Of a pipeline in this process, which `open` then gives as long as somebody holds it."""
        shas = fingerprint(pipe.transformer), fingerprint(pipe.vae)
        source = cls(*shas, pipe.identity(), pipe.name, pipe.loaded_with)
        _given[source] = pipe
        return source

    @property
    def model(self) -> tuple[str, Mapping[str, Any]]:
        """What a method starts from: a transformer that it makes is found by this and by the method."""
        return self.transformer, self.identity

    def load(self, device: str) -> Pipeline:
        """The pipeline, loaded anew onto the CPU or, whatever else `device` says, the GPU.

        Raises RuntimeError, naming the first difference, where it is another one here.
        """
        pipe = pipeline.load(self.name, device="cpu" if device == "cpu" else "cuda", **self.loaded_with)
        found = Source.of(pipe)
        here, study = ({"transformer": s.transformer, "vae": s.vae} | s.identity for s in (found, self))
        for key, here_value, study_value in differences(here, study):
            raise RuntimeError(
                f"{self.name} is another pipeline here: {key}={here_value}, the study's is {study_value}"
            )
        return pipe

    def open(self, device: str) -> Pipeline:
        """The pipeline, on the kind of device that a `device_label` says; loaded once a process.

        Raises RuntimeError as `load` does, and where the device is another one.
        """
        pipe = _given.get(self) or _loaded.get(self)
        if pipe is None:
            pipe = self.load(device)
            _loaded.clear()
            _loaded[self] = pipe
        if device_label(pipe.device) != device:
            raise RuntimeError(f"this worker computes on {device_label(pipe.device)}, the study's rows on {device}")
        return pipe
