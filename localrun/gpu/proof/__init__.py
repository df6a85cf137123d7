"""The GPU half proves itself on the card it meets: each part in a child process, against the CPU; and the verdict."""
