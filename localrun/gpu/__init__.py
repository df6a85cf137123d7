"""The GPU half: Triton kernels over GGUF blocks in VRAM. Imported only when a GPU (or its stand-in) is asked for."""
