"""For all tests: Ctrl-C as on a terminal."""

import signal

# A suite that is started in the background inherits SIGINT ignored, and so would the processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
