"""The methods that the paper compares UniGist with, one file each; `unigist_jax.inference.methods` names them all."""
