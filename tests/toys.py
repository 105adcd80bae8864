"""Tasks of a few milliseconds, which leave a mark each time they are begun and fail in every way that tasks do."""

import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from vqlib.studies.tasks import Needs


@dataclass(frozen=True)
class Toy:
    """n², after the toys in `before`. `trouble`: "error"; "killed" or "full" the first time; "always killed"; "slow";
    "meets": waits for another process."""

    n: int
    trouble: str = ""
    before: tuple = ()
    needs: Needs = Needs()
    cost: float = 1.0

    def __str__(self):
        return f"toy {self.n}"

    def made_of(self):
        return "toy", self.n

    def after(self):
        return self.before

    def leaves(self):
        return (f"squares/{self.n}",)

    def others(self, marks):
        """Which processes have begun toys that are not among those before it, its own too."""
        before = {str(toy.n) for toy in self.before}
        names = [path.name.split("-") for path in marks.iterdir()]
        return {process for n, process, _ in names if n not in before}

    def run(self, folder, unfinished):
        marks = Path(folder) / "marks"
        marks.mkdir(exist_ok=True)
        first = not list(marks.glob(f"{self.n}-*"))
        (marks / f"{self.n}-{os.getpid()}-{time.time_ns()}").touch()
        if self.trouble == "error":
            raise ValueError(f"{self.n} cannot be squared (layer 3)")
        if self.trouble == "full" and first:
            raise OSError(errno.ENOSPC, "No space left on device")
        if (self.trouble == "killed" and first) or self.trouble == "always killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "slow":
            time.sleep(0.3)
        end = time.monotonic() + 60
        while self.trouble == "meets" and time.monotonic() < end and len(self.others(marks)) < 2:
            time.sleep(0.05)
        own = Path(folder) / self.leaves()[0]
        own.mkdir(parents=True, exist_ok=True)
        (own / "root.txt").write_text(str(self.n))
        read = [(Path(folder) / before.leaves()[0] / "root.txt").read_text() for before in self.before]
        return {"square": self.n**2, "pid": os.getpid(), "read": read}


def begun(folder, n):
    """How often the toy was begun."""
    return len(list((Path(folder) / "marks").glob(f"{n}-*")))
