"""For all tests: Ctrl-C as on a terminal, and Triton's interpreter where there is no GPU."""

import signal

import gpu_device  # noqa: F401 (before any test imports what imports triton)

# A suite that is started in the background inherits SIGINT ignored, and so would the processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
