"""The commands that get models, and say and delete what is there."""
