"""Parts of scripts/bench_hybrid.py."""
