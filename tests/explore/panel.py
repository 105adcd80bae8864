"""A front end that remembers what it was shown."""

PATIENCE = 60  # seconds until a test that hangs is taken for one


class Panel:
    """What a front end sees: pictures and captions in the order in which they came."""

    def __init__(self, view):
        self.seen, self.done = [], 0
        view.listeners.append(self)

    def show(self, png, caption):
        self.seen.append((png, caption))

    def finished(self, picture):
        self.done += 1

    def synchronize(self):
        pass
