"""A small tokenizer of the kind of Llama 3's, with a chat template, for the tests of tokenizers and of chats."""

import argparse
import inspect
import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

BEGIN, END, TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if tools is none and add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""


def write_chat_tokenizer(folder):
    """Writes a byte-level tokenizer of 596 ids and the files that stand beside it in a checkpoint."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=590, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([inspect.getsource(argparse)], trainer)
    marks = [BEGIN, END, TURN, "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens([tokenizers.AddedToken(mark, special=True) for mark in marks])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": BEGIN, "eos_token": {"__type": "AddedToken", "content": END}, "chat_template": TEMPLATE}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ends = [tokenizer.token_to_id(END), tokenizer.token_to_id(TURN)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
