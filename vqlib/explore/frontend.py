"""A view in the notebook: the still figure, then sliders, picture and export. The only file that imports ipywidgets.

The still figure is a plain output that stays in the saved notebook. In JupyterLab the live view hides it while there is one,
so that no picture stands there twice; without ipywidgets or without a kernel the still figure is what is seen.
"""

from __future__ import annotations

import base64
import html
from typing import Any

from vqlib.explore.view import Control, Picture, View
from vqlib.figures.styles import VENUES

LIVE = "vqlib-live"  # the class of a live view's box
CSS = (
    f"<style>.jp-OutputArea-child:has(+ .jp-OutputArea-child .{LIVE}) {{ display: none }} "
    f".{LIVE} .widget-html-content {{ line-height: 1.4; padding: 4px 0 }}</style>"
)
FEW = 4  # up to so many values without an order are buttons, more a list
READOUT = 14  # characters beside a slider; longer values stand in the line above the picture only


def show(view: View) -> None:
    """Display the still figure of `view` and, where ipywidgets is installed, its controls below."""
    from IPython.display import display

    still = display(_bundle(view.still()), raw=True, display_id=True)
    try:
        import ipywidgets
    except ImportError:
        print(f"{view.shown.caption}\nA still figure: sliders and buttons need ipywidgets.")
        return
    panel = Panel(view, ipywidgets, still)
    view.listeners.append(panel)
    display(panel.box)


def _bundle(picture: Picture) -> dict[str, str]:
    return {"image/png": base64.b64encode(picture.png).decode(), "text/plain": picture.caption}


class Panel:
    """The widgets of one view; it listens to the view and tells it what the user does."""

    def __init__(self, view: View, widgets: Any, still: Any) -> None:
        self.view, self.widgets, self._still = view, widgets, still
        self.inputs = {control.name: self._input(control) for control in view.controls}
        self.caption = widgets.HTML()
        self.image = widgets.Image(format="png", layout={"max_width": "100%"})
        self.path = widgets.HTML()
        buttons = [self._button(label, action) for label, action in view.actions.items()]
        head = [self._row([*self.inputs.values(), *buttons])] if self.inputs or buttons else []
        self.box = widgets.VBox([widgets.HTML(CSS), *head, self.caption, self.image, *self._export()])
        for part, name in ((self.box, LIVE), (self.box, f"vqlib-{view.name}"), (self.caption, "vqlib-caption")):
            part.add_class(name)
        self.path.add_class("vqlib-path")
        self.synchronize()
        self.show(view.shown.png, view.shown.caption)

    def show(self, png: bytes | None, caption: str) -> None:
        """Put a picture on the screen, and the line above it; without a picture the old one stays."""
        self.caption.value = html.escape(caption)
        if png is not None:
            self.image.value = png

    def finished(self, picture: Picture) -> None:
        """Keep the picture in the saved notebook, too."""
        self._still.update(_bundle(picture), raw=True)

    def synchronize(self) -> None:
        """Controls as the view's settings are; nothing happens where they agree already."""
        for name, value in self.view.settings.items():
            if self.inputs[name].value != value:
                self.inputs[name].value = value

    def _input(self, control: Control) -> Any:
        """A slider, buttons or a list that sets one setting of the view."""
        options = [(self._text(value), value) for value in control.options]
        if control.ordered:
            short = max(len(text) for text, _ in options) <= READOUT
            kind, extra = self.widgets.SelectionSlider, {"layout": {"width": "20em"}, "readout": short}
        elif len(options) <= FEW:
            kind, extra = self.widgets.ToggleButtons, {"style": {"button_width": "auto"}, "layout": {"width": "auto"}}
        else:
            kind, extra = self.widgets.Dropdown, {"layout": {"width": "20em"}}
        made = kind(options=options, value=control.value, description=control.label, **extra)
        made.description_allow_html = False
        made.tooltip = control.tip or control.label
        made.observe(lambda change: self._changed(control.name, change["new"]), "value")
        return made

    def _changed(self, name: str, value: Any) -> None:
        if self.view.settings[name] != value:
            self.view.set(**{name: value})

    def _button(self, label: str, action: Any) -> Any:
        button = self.widgets.Button(description=label, layout={"width": "auto"})
        button.on_click(lambda _: action())
        return button

    def _export(self) -> list[Any]:
        """A venue, one column or two, a button, and where the files went."""
        venue = self.widgets.Dropdown(options=list(VENUES), value="notebook", layout={"width": "9em"})
        columns = self.widgets.Dropdown(
            options=[("one column", 1), ("text width", 2)], value=1, layout={"width": "9em"}
        )
        venue.tooltip, columns.tooltip = "whose fonts and widths the figure takes", "how wide the figure is"
        button = self._button("Export", lambda: self.view.exported(venue.value, columns.value, self._say_path))
        button.tooltip = "write PDF, SVG, PNG and data"
        return [self._row([button, venue, columns]), self.path]

    def _say_path(self, text: str) -> None:
        self.path.value = html.escape(text)

    def _row(self, children: list[Any]) -> Any:
        return self.widgets.Box(children, layout={"flex_flow": "row wrap", "align_items": "center"})

    @staticmethod
    def _text(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)
