"""Training of the bundled miniature: DeepSeek-V3's architecture at 26 million parameters. See docs/miniature.md."""
