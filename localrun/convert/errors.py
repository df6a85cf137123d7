"""What can be wrong with the model that is to be converted."""

from localrun.errors import LocalrunError


class CheckpointError(LocalrunError):
    """A checkpoint that does not hold together, or holds what has no place in a GGUF; names file and tensor."""
