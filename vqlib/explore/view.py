"""A figure that depends on a few settings: computed in the background, kept when seen, exported for paper.

A view knows nothing of widgets. `set()` does from code what a slider does in the browser.
"""

from __future__ import annotations

import atexit
import io
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from cachetools import LRUCache
from matplotlib.figure import Figure

from vqlib.explore.drawing import Drawing
from vqlib.figures.styles import save_figure, style
from vqlib.figures.tables import save_table

SEEN = 48  # pictures kept, so that going back is instant
PREVIEW_EVERY = 0.5  # seconds between two pictures of work in progress

Settings = Mapping[str, Any]
_views: weakref.WeakSet[View] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread that computes while the interpreter ends would abort the process."""
    for view in list(_views):
        view.end()


@dataclass(frozen=True)
class Control:
    """One setting and the values it can take: a slider where they have an order, else buttons or a list."""

    name: str
    label: str
    options: Sequence[Any]
    value: Any
    ordered: bool = True
    tip: str = ""

    def __post_init__(self) -> None:
        if self.value not in self.options:
            raise ValueError(f"{self.name}={self.value!r} is not one of {list(self.options)}")


@dataclass(frozen=True)
class Picture:
    """What a view shows: `draw(titled)` makes the figure in the style around it; an export adds data and table."""

    draw: Callable[[bool], Figure]
    caption: str
    data: pd.DataFrame | None = None
    table: pd.DataFrame | None = None
    png: bytes = field(default=b"", repr=False)

    def rendered(self) -> Picture:
        """The same with `png`, as wide as a notebook's figures."""
        return Picture(self.draw, self.caption, self.data, self.table, png(lambda: self.draw(True)))


def png(draw: Callable[[], Figure]) -> bytes:
    """The figure that `draw` makes in the notebook's style."""
    buffer = io.BytesIO()
    with style("notebook"):
        draw().savefig(buffer, format="png")
    return buffer.getvalue()


class View:
    """A still figure first, then controls. Subclasses say what is computed (`prepare`) and shown (`picture`)."""

    name = "view"
    subject = ""  # what is shown, where settings do not say it: part of an exported file's name
    show: Callable[[View], None]  # puts a view on the screen; `vqlib.explore` gives the frontend's
    actions: Mapping[str, Callable[[], object]] = {}  # label of a button -> what it does

    def __init__(self, controls: Sequence[Control], out: str | Path) -> None:
        self.controls, self.out = tuple(controls), Path(out).expanduser()
        self.settings: dict[str, Any] = {control.name: control.value for control in controls}
        self.shown: Picture | None = None  # the last finished picture
        self.shown_settings: Settings = self.settings  # what it was made with; the settings may be ahead of it
        self.error: Exception | None = None
        self.listeners: list[Any] = []  # panels: .show(png, caption), .finished(picture), .synchronize()
        self._seen, self._drawing = LRUCache(SEEN), Drawing()
        self._newest = self._finished = 0  # numbers of requests
        self._lock, self._computing = threading.RLock(), threading.Lock()
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        _views.add(self)

    def prepare(self, settings: Settings, task: Task) -> Any:
        """What takes time, on the background thread; looks at `task.cancelled` now and then."""
        return None

    def picture(self, settings: Settings, prepared: Any) -> Picture:
        """What is shown, from what `prepare` returned."""
        raise NotImplementedError

    def normalized(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings of which every combination makes sense."""
        return settings

    def set(self, **changes: Any) -> None:
        """Change settings and show what belongs to them; returns at once. ValueError names what is unknown."""
        for name, value in changes.items():
            known = next((c for c in self.controls if c.name == name), None)
            if known is None:
                raise ValueError(f"no setting {name!r}; there are {', '.join(self.settings) or 'none'}")
            if value not in known.options:
                raise ValueError(f"{name}={value!r} is not one of {list(known.options)}")
        with self._lock:
            self.settings = self.normalized({**self.settings, **changes})
            self.request()
        for listener in self.listeners:
            listener.synchronize()

    def request(self) -> None:
        """Show the picture of the settings: a known one at once, a new one when it is ready."""
        with self._lock:
            self._newest += 1
            settings, task = dict(self.settings), Task(self, self._newest)
            known = self._seen.get(self._key(settings))
        if known is not None:
            self._finish(known, settings, task)
        else:
            thread = threading.Thread(target=self._compute, args=(settings, task), name="vqlib-explore", daemon=True)
            self._threads.add(thread)
            thread.start()

    def still(self) -> Picture:
        """The picture of the settings, computed now and here unless it is known."""
        settings = dict(self.settings)
        key = self._key(settings)
        with self._computing:  # what is being computed may be just this
            with self._lock:
                known = self._seen.get(key)
            if known is None:
                known = self.picture(settings, self.prepare(settings, Task(None, 0))).rendered()
                with self._lock:
                    self._seen[key] = known
        with self._lock:
            self.shown, self.shown_settings = known, settings
        return known

    def wait(self, timeout: float | None = None) -> None:
        """Until the newest request is shown; raises what went wrong, TimeoutError after `timeout` seconds."""
        self._drawing.wait(lambda: self._finished >= self._newest, timeout)
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        """Give up what is being computed, and wait until it is."""
        with self._lock:
            self._newest += 1
        for thread in list(self._threads):
            thread.join()

    def export(self, venue: str = "notebook", columns: int = 1) -> dict[str, Path]:
        """Write what is shown into `out`, as wide as the venue's column (columns=1) or text; returns {suffix: path}.

        Files are named after view, subject, venue and settings, and replace those of the same name.
        """
        if self.shown is None:
            self.still()
        with self._lock:
            picture, settings = self.shown, self.shown_settings
        values = [venue, *("wide" for _ in range(columns - 1)), *map(str, settings.values())]
        named = [self.name, *([self.subject] if self.subject else []), *values]
        stem = self.out / re.sub(r"[^\w.-]+", "-", "_".join(named))
        with style(venue, columns):
            paths = save_figure(picture.draw(venue == "notebook"), stem, picture.data)
        if picture.table is not None:
            tables = save_table(picture.table, f"{stem}_table", caption=picture.caption)
            paths |= {f"table.{kind}": path for kind, path in tables.items()}
        return paths

    def exported(self, venue: str, columns: int, report: Callable[[str], object]) -> None:
        """As `export`, on the thread that draws; `report` is told where the files are or what went wrong."""

        def write() -> None:
            try:
                paths = self.export(venue, columns)
                kinds = ", ".join(path.suffix for path in paths.values())
                report(f"{next(iter(paths.values())).resolve().with_suffix('')} ({kinds})")
            except Exception as error:
                report(f"{type(error).__name__}: {error}")

        self._drawing.call(write)

    def _ipython_display_(self) -> None:
        self.show()

    def _key(self, settings: Settings) -> tuple:
        return tuple(settings.values())

    def _compute(self, settings: Settings, task: Task) -> None:
        """On a thread of its own, one after another: prepare, then have the picture drawn."""
        with self._computing:
            if task.cancelled:
                return
            try:
                prepared = self.prepare(settings, task)
            except Exception as error:
                return self._fail(error, task)
        self._drawing.call(lambda: self._render(settings, prepared, task))

    def _render(self, settings: Settings, prepared: Any, task: Task) -> None:
        if task.cancelled:
            return
        key = self._key(settings)  # before the picture: a run goes on while it is drawn
        try:
            picture = self.picture(settings, prepared).rendered()
        except Exception as error:
            return self._fail(error, task)
        with self._lock:
            self._seen[key] = picture
            self._finish(picture, settings, task)

    def _finish(self, picture: Picture, settings: Settings, task: Task) -> None:
        with self._lock:
            if task.cancelled:
                return
            self.shown, self.shown_settings = picture, settings
            self.error, self._finished = None, task.number
            for listener in self.listeners:
                listener.show(picture.png, picture.caption)
                listener.finished(picture)

    def _fail(self, error: Exception, task: Task) -> None:
        with self._lock:
            if task.cancelled:  # also how a cancelled computation ends
                return
            self.error, self._finished = error, task.number
            for listener in self.listeners:
                listener.show(None, f"{type(error).__name__}: {error}")


class Task:
    """One request on its way: is it still wanted, and what can be shown before it is done?"""

    def __init__(self, view: View | None, number: int) -> None:
        self.view, self.number = view, number
        self._drawing, self._last = False, -PREVIEW_EVERY

    @property
    def cancelled(self) -> bool:
        """Whether a newer request has come."""
        return self.view is not None and self.view._newest != self.number

    @property
    def preview_due(self) -> bool:
        """Whether someone looks and the last preview is drawn and old enough for another."""
        watched = self.view is not None and bool(self.view.listeners)
        return watched and not self._drawing and time.monotonic() - self._last >= PREVIEW_EVERY

    def say(self, caption: str) -> None:
        """Show one line of text above the picture that is there."""
        if self.view is not None and not self.cancelled:
            for listener in self.view.listeners:
                listener.show(None, caption)

    def preview(self, draw: Callable[[], Figure], caption: str) -> None:
        """Show a figure of work in progress."""
        if not self.preview_due or self.cancelled:
            return
        self._drawing = True
        self.view._drawing.call(lambda: self._show(draw, caption))

    def _show(self, draw: Callable[[], Figure], caption: str) -> None:
        try:
            image = None if self.cancelled or self.number <= self.view._finished else png(draw)
            if image is not None and not self.cancelled:
                for listener in self.view.listeners:
                    listener.show(image, caption)
        finally:
            self._drawing, self._last = False, time.monotonic()
