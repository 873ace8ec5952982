"""Peak learning rate, for models trained from random weights. A pretrained Llama wants about 1e-5, as in the paper."""


def sweep(add):
    for peak_lr in (3e-4, 1e-3, 3e-3, 1e-2):
        add(**{"optim.peak_lr": peak_lr})
