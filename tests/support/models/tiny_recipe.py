"""What recipes need to run, in small: a tokenizer, a model folder, text files."""

import json
import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support.models.tiny_qwen3 import tiny_qwen3

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "far", "away"]


def byte_tokenizer():
    """One token a byte, and the token that ends a document: 0."""
    vocabulary = {"<end>": 0} | {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def words(count, seed=0):
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(count))


def write_inputs(folder, **overrides):
    """model/, train.txt and eval.txt, one document each, and train.jsonl of many short ones."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "head_dim": 16, "tie_word_embeddings": True}
    tiny_qwen3(**sizes | overrides).save_pretrained(folder / "model")
    (folder / "train.txt").write_text(words(1000, seed=1), encoding="utf-8")
    (folder / "eval.txt").write_text(words(120, seed=2), encoding="utf-8")
    documents = "".join(json.dumps({"text": words(2 + number % 9, seed=number)}) + "\n" for number in range(60))
    (folder / "train.jsonl").write_text(documents, encoding="utf-8")
