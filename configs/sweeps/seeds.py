"""The same run from other random numbers: how far results differ by chance, to be held against any other sweep."""


def sweep(add):
    for seed in (0, 1, 2, 3):
        add(**{"train.seed": seed})
