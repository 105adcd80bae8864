"""A JupyterLab server on a free loopback port, and a page of Chromium on it."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from playwright.sync_api import Browser, Locator, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "data/runs/browser"  # not tracked; to be looked at
WIDTH, HEIGHT = 1280, 900
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
PATIENCE = float(os.environ.get("BROWSER_PATIENCE", 120))  # seconds for anything that has to happen
TOKEN = secrets.token_hex()  # a server runs code for whoever knows it
NOISE = "Could not restore the debugger state"  # JupyterLab's own, where a tab closes while its debugger starts
SETTINGS = {
    "apputils-extension/notification": {"checkForUpdates": False, "fetchNews": "false"},
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are in the page, too
}


@contextmanager
def server(folder: Path, log: Path):
    """Yield the address of a JupyterLab whose root is `folder`; settings and workspaces are its own and go with it."""
    private = folder.parent / f"{folder.name}-jupyter"
    for plugin, settings in SETTINGS.items():
        file = private / "settings/@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(settings))
    places = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    places |= {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    environment = os.environ | {name: str(private / part) for name, part in places.items()}
    environment["PYTHONPATH"] = str(ROOT / "tests")  # `tiny`, for kernels
    environment["JUPYTER_TOKEN"] = TOKEN
    environment.pop("MPLBACKEND", None)  # kernels choose theirs
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", "--LabApp.expose_app_in_browser=True"]
    command += [f"--ServerApp.root_dir={folder}", "--LabApp.extension_manager=readonly"]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            _until_up(f"http://127.0.0.1:{port}/api", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def _until_up(address: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert process.poll() is None, f"JupyterLab ended with {process.returncode}:\n{log.read_text()[-2000:]}"
        try:
            urllib.request.urlopen(address, timeout=2)
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(f"JupyterLab did not answer within {PATIENCE:g} s:\n{log.read_text()[-2000:]}")


@contextmanager
def browser():
    """Yield a headless Chromium. Raises FileNotFoundError where none is installed."""
    names = os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        raise FileNotFoundError("no chromium on the PATH; `make browser` installs Debian's")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def write_copy(source: Path, target: Path, parameters: dict[str, Any]) -> Path:
    """A copy of a notebook with other parameters and without outputs."""
    notebook = parameterize_notebook(load_notebook_node(str(source)), parameters)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, target)
    return target


class Lab:
    """JupyterLab in one page, one notebook at a time, and everything the page's console complained about."""

    def __init__(self, chromium: Browser, address: str) -> None:
        self.page: Page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        self.page.set_default_timeout(1000 * PATIENCE)
        self.complaints: list[str] = []
        self.page.on("console", lambda message: message.type == "error" and self._complain(message.text))
        self.page.on("pageerror", lambda error: self._complain(str(error)))
        self.page.goto(f"{address}/lab?reset&token={TOKEN}")  # no notebook of an earlier page is opened again
        self.page.wait_for_function("() => window.jupyterapp")
        self.page.evaluate("window.jupyterapp.restored.then(() => null)")
        self.images = self.page.locator(".jp-OutputArea-output img")

    def _complain(self, text: str) -> None:
        if not text.startswith(NOISE):
            self.complaints.append(text)

    def open(self, name: str) -> None:
        """Show the notebook `name` with its kernel ready."""
        self.command("docmanager:open", path=name)
        self.page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        self.page.wait_for_function(
            "() => window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        )

    def close(self) -> None:
        """Close the notebook without saving it; its kernel goes on."""
        self.page.evaluate(
            """() => {
                const shown = window.jupyterapp.shell.currentWidget;
                shown.context.model.dirty = false;
                shown.close();
            }"""
        )
        self.page.locator(".jp-Notebook").wait_for(state="detached")

    def end_kernels(self) -> None:
        """End all kernels of the server."""
        self.page.evaluate("window.jupyterapp.serviceManager.sessions.shutdownAll().then(() => null)")

    def command(self, name: str, **arguments: Any) -> None:
        """Execute a command of JupyterLab and wait for its end."""
        script = "([name, args]) => window.jupyterapp.commands.execute(name, args).then(() => null)"
        self.page.evaluate(script, [name, arguments])

    def run_all(self, wait: bool = True) -> None:
        """Run every cell; none may end with an error. Without `wait`, return when they are queued."""
        if not wait:
            self.page.evaluate("() => void window.jupyterapp.commands.execute('notebook:run-all-cells')")
            return
        self.command("notebook:run-all-cells")
        errors = self.page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']")
        assert errors.count() == 0, errors.first.inner_text()

    @property
    def kernel(self) -> str:
        """What the kernel does: idle, busy, ..."""
        return self.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status")

    def theme(self, name: str) -> None:
        """Change to one of `THEMES`."""
        self.command("apputils:change-theme", theme=THEMES[name])
        self.page.locator(f"body[data-jp-theme-name='{THEMES[name]}']").wait_for(state="attached")

    def figures(self) -> list[int]:
        """Widths in pixels of all figures that are seen; 0 where one did not load."""
        script = "list => list.filter(i => i.offsetParent !== null).map(i => i.complete ? i.naturalWidth : 0)"
        return self.images.evaluate_all(script)

    def right_edges(self, parts: Locator) -> list[float]:
        """Where each part ends, in pixels from the left of the page."""
        return parts.evaluate_all("list => list.map(i => i.getBoundingClientRect().right)")

    def screenshot(self, name: str, part: Locator | None = None) -> Path:
        """Save the page, or a part of it that is scrolled to, as a picture."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        if part is not None:
            part.scroll_into_view_if_needed()
        self.page.wait_for_timeout(300)
        self.page.screenshot(path=path)
        return path


class Explorer:
    """One live view in a notebook; the last where there are several of its kind."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab, self.page = lab, lab.page
        self.box = self.page.locator(f".vqlib-{name}").last
        self.box.scroll_into_view_if_needed()

    @property
    def caption(self) -> str:
        """The line above the picture."""
        return self.box.locator(".vqlib-caption").inner_text().strip()

    @property
    def picture(self) -> str:
        """A fingerprint of the picture."""
        script = """async image => {
            const data = await (await fetch(image.src)).arrayBuffer();
            return Array.from(new Uint8Array(await crypto.subtle.digest('SHA-1', data))).join('-');
        }"""
        return self.box.locator("img.widget-image").evaluate(script)

    def button(self, name: str) -> Locator:
        """A button by its label."""
        return self.box.get_by_role("button", name=name, exact=True)

    def press(self, label: str, *keys: str) -> None:
        """Press keys on the slider called `label`."""
        slider = self.box.locator(".widget-hslider").filter(has_text=re.compile(rf"^{label}"))
        for key in keys:
            slider.locator(".noUi-handle").press(key)

    def until(self, pattern: str, part: str = ".vqlib-caption") -> re.Match:
        """Wait until the caption, or another part's text, matches."""
        end = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, text := self.box.locator(part).inner_text().strip())):
            assert time.monotonic() < end, f"{pattern!r} did not come; {part} says {text!r}"
            self.page.wait_for_timeout(50)
        return found

    def until_picture_is_not(self, known: str) -> None:
        """Wait for another picture."""
        end = time.monotonic() + PATIENCE
        while self.picture == known:
            assert time.monotonic() < end, f"the picture did not change; the caption is {self.caption!r}"
            self.page.wait_for_timeout(50)

    def watch(self) -> None:
        """From now on, note when keys are pressed and when pictures are there."""
        self.box.evaluate(
            """box => {
                const log = window.vqlibLog = [], note = what => () => log.push([what, performance.now()]);
                document.addEventListener('keydown', note('key'), true);
                box.querySelector('img.widget-image').addEventListener('load', note('picture'));
            }"""
        )

    def noted(self) -> list[tuple[str, float]]:
        """What was noted, as (what, milliseconds); the list starts anew."""
        return self.page.evaluate("() => window.vqlibLog.splice(0)")
