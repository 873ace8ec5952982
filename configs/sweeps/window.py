"""Local window, in raws: the paper's ablation, in which 128 is the best. The ratio must divide 32."""


def sweep(add):
    for window in (0, 32, 64, 128, 256, 512):
        add(**{"gist.window": window})
