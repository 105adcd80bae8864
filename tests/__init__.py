"""A package, so that `tests.…` means this folder and not the `tests` that some wheel leaves in site-packages."""
