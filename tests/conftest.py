"""Settings of all tests."""

from hypothesis import settings

# No deadline per example: a busy machine is no fault of the code. Runs draw the same examples.
settings.register_profile("ringkern", deadline=None, derandomize=True)
settings.load_profile("ringkern")
