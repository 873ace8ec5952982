"""Sink tokens: the paper's ablation, in which training without sinks shows gradient spikes (see max_grad_norm)."""


def sweep(add):
    for num_sinks in (0, 4, 32, 128):
        add(**{"gist.num_sinks": num_sinks})
