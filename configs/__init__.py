"""Run configs. Each returns the whole config from `get_config()`; `launch.train --config=configs/NAME.py` reads it."""
