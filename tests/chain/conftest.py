"""Fixtures that the tests of the chain share."""

from fake_chain import fakes, project  # noqa: F401
