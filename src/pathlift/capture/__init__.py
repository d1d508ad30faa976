"""Model and example inputs -> :class:`~pathlift.capture.program.Program`."""
