"""What gist and sink embeddings begin as: small or large around 0, around the vocabulary's mean, or some tokens' own.

Means most with --train_flag=--init_from=DIRECTORY of a pretrained Llama: the mean of a random vocabulary is nearly 0.
"""


def sweep(add):
    for scale in (0.02, 1.0):
        add(name=f"normal,scale={scale}", **{"model.gist_init": "normal", "model.gist_init_scale": scale})
    add(name="mean", **{"model.gist_init": "mean"})
    add(name="tokens", **{"model.gist_init": "tokens"})
