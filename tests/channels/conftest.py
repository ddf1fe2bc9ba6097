"""A place that everybody can reach."""

from tests.mount.conftest import public

__all__ = ["public"]
