"""The ways in which a captured step hands work to the CPU (handover.py): names that a verdict keeps. No torch."""

HOST_NODES, STREAM_MEMORY = "host nodes", "stream memory operations"
