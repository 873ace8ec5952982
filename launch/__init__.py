"""Commands: `python -m launch.NAME --help`. Flags and wiring only; the work is in `unigist_jax`."""
