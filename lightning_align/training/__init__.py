"""The base module and data module, their parts, callbacks, schedules and metrics."""
